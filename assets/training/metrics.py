"""Count word errors."""


def word_errors(reference: str, hypothesis: str) -> int:
    """Return the least number of word substitutions, insertions and deletions (Levenshtein)."""
    expected, actual = reference.split(), hypothesis.split()
    row = list(range(len(actual) + 1))
    for i, word in enumerate(expected, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(actual, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]

"""Align words with audio steps by the CTC head, and guide attention heads of the language model to those steps.

Without guidance the adapter first learns which sentences are likely, and only much later where to listen.
"""

import numpy as np
import torch

from mmlora.assets.training.rows import Batch

GUIDED_LAYERS = (2, 3)
GUIDED_HEADS = 2
SUM_LAYERS = (1, 2)
SUM_HEADS = (2, 3)
_NEVER = -1e9


def forced_alignment(log_probs: np.ndarray, targets: list[list[int]]) -> list[np.ndarray]:
    """Find the most likely CTC path (Viterbi) of known characters.

    Args:
        log_probs: `[num_clips, num_steps, num_characters]`, blank at 0.
        targets: The characters of each clip.

    Returns:
        For each clip the index of the character that each step emits, -1 for blank, `[num_steps]`.
    """
    num_clips, num_steps, _ = log_probs.shape
    num_states = 2 * max(map(len, targets)) + 1
    labels = np.zeros((num_clips, num_states), dtype=np.int64)
    for i, target in enumerate(targets):
        labels[i, 1 : 2 * len(target) : 2] = target
    can_skip = np.zeros(labels.shape, dtype=bool)
    can_skip[:, 2:] = (labels[:, 2:] != 0) & (labels[:, 2:] != labels[:, :-2])
    emissions = np.take_along_axis(log_probs, np.broadcast_to(labels[:, None], (num_clips, num_steps, num_states)), 2)
    score = np.full(labels.shape, _NEVER)
    score[:, :2] = emissions[:, 0, :2]
    back = np.zeros((num_steps, num_clips, num_states), dtype=np.int64)
    for t in range(1, num_steps):
        one = np.pad(score, ((0, 0), (1, 0)), constant_values=_NEVER)[:, :-1]
        two = np.where(can_skip, np.pad(score, ((0, 0), (2, 0)), constant_values=_NEVER)[:, :-2], _NEVER)
        moves = np.stack([score, one, two])
        back[t] = moves.argmax(0)
        score = moves.max(0) + emissions[:, t]
    return [_backtrack(score[i], back[:, i], len(target)) for i, target in enumerate(targets)]


def _backtrack(score: np.ndarray, back: np.ndarray, length: int) -> np.ndarray:
    state = 2 * length if score[2 * length] >= score[2 * length - 1] else 2 * length - 1
    path = np.empty(len(back), dtype=np.int64)
    for t in range(len(back) - 1, -1, -1):
        path[t] = state
        state -= back[t, state]
    return np.where(path % 2 == 1, path // 2, -1)


def word_spans(path: np.ndarray, text: str) -> list[tuple[int, int]]:
    """Return the first and last step of every word of `text`, given the character that each step emits."""
    spans, start = [], 0
    for word in text.split():
        steps = np.flatnonzero((path >= start) & (path < start + len(word)))
        spans.append((int(steps[0]), int(steps[-1])))
        start += len(word) + 1
    return spans


def guide_mask(
    batch: Batch, audio_token: int, assistant: int, transcripts: list[list[int]], spans: list[list[tuple[int, int]]]
) -> torch.Tensor:
    """Mark, for each position that predicts a word of a transcript, that word's audio positions, with a margin of one.

    Returns:
        `[num_rows, num_tokens, num_tokens]` fp32 of ones and zeros.
    """
    mask = torch.zeros(batch.ids.shape[0], batch.ids.shape[1], batch.ids.shape[1])
    for i, (words, word_steps) in enumerate(zip(transcripts, spans, strict=True)):
        ids = batch.ids[i].tolist()
        first = ids.index(audio_token)
        for p, token in enumerate(ids):
            if token == assistant and ids[p + 1 : p + 1 + len(words)] == words:
                for k, (start, stop) in enumerate(word_steps):
                    mask[i, p + k, first + max(0, start - 1) : first + stop + 2] = 1
                break
    return mask


def guide_loss(
    attentions: tuple[torch.Tensor, ...], mask: torch.Tensor, layers: tuple[int, ...] = GUIDED_LAYERS
) -> torch.Tensor:
    """Return minus the mean log attention that the guided heads of some layers pay to the marked positions."""
    queries = mask.sum(-1) > 0
    losses = []
    for layer in layers:
        mass = (attentions[layer][:, :GUIDED_HEADS] * mask[:, None]).sum(-1)
        losses.append(-torch.log(mass.transpose(1, 2)[queries] + 1e-4).mean())
    return torch.stack(losses).mean()


def token_loss(
    audio_embeds: torch.Tensor,
    token_embeddings: torch.Tensor,
    words: list[list[int]],
    spans: list[list[tuple[int, int]]],
) -> torch.Tensor:
    """Draw the audio embedding at the end of every word towards the embedding of that word's token.

    Cross-entropy over cosine similarities: the frozen language model then finds in the audio what it knows from text.

    Args:
        audio_embeds: Projected audio, `[num_clips, num_steps, hidden_size]`.
        token_embeddings: `[vocab_size, hidden_size]`.
        words: The tokens of the words of each clip.
        spans: Their first and last steps.
    """
    clips = [i for i, steps in enumerate(spans) for _ in steps]
    stops = [stop for steps in spans for _, stop in steps]
    targets = torch.tensor([token for tokens in words for token in tokens])
    ends = torch.nn.functional.normalize(audio_embeds[clips, stops], dim=-1)
    logits = 12 * ends @ torch.nn.functional.normalize(token_embeddings, dim=-1).T
    return torch.nn.functional.cross_entropy(logits, targets)


def sum_guide_loss(
    attentions: tuple[torch.Tensor, ...],
    batch: Batch,
    markers: tuple[int, int],
    answers: list[int | None],
    spans: list[list[tuple[int, int]]],
) -> torch.Tensor:
    """Guide one head to each operand where the answer of a spoken sum is predicted.

    Args:
        attentions: Attention weights by layer.
        batch: The rows, one for each clip.
        markers: The token ids of the audio placeholder and of the assistant marker.
        answers: The answer's token for clips that are sums; the operands are their third last and last word.
        spans: First and last step of every word of every clip.
    """
    audio_token, assistant = markers
    losses = []
    for i, (answer, steps) in enumerate(zip(answers, spans, strict=True)):
        if answer is None:
            continue
        ids = batch.ids[i].tolist()
        first = ids.index(audio_token)
        positions = [p for p in range(len(ids) - 1) if ids[p] == assistant and ids[p + 1] == answer]
        if not positions:
            continue
        for head, (start, stop) in zip(SUM_HEADS, (steps[-3], steps[-1]), strict=True):
            for layer in SUM_LAYERS:
                seen = attentions[layer][i, head, positions, first + max(0, start - 1) : first + stop + 2]
                losses.append(-torch.log(seen.sum(-1) + 1e-4).mean())
    return torch.stack(losses).mean() if losses else attentions[0].new_zeros(())

"""Tie answers about pictures to the places that show them: guided attention and token-like picture embeddings.

These auxiliary losses only speed training up; nothing of them is left in the model.
"""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from mmlora.assets.training.pictures import SIDE, Scene, Shape
from mmlora.assets.training.rows import Batch
from mmlora.assets.training.world import COLORS, SHAPES, SIZES

CELLS_PER_SIDE = 4
COMPARE_LAYER, COMPARE_HEADS = 2, (2, 3)
GLOBAL_VIEW = CELLS_PER_SIDE * (CELLS_PER_SIDE + 1) + 1


def cell_offset(cell: int) -> int:
    """Return the index of a cell among the tokens of a picture: every row of cells ends in a newline token."""
    return cell + cell // CELLS_PER_SIDE


def look_mask(batch: Batch, image_token: int) -> torch.Tensor:
    """Mark for each position that looks at a cell the two picture tokens of that cell.

    Returns:
        `[num_rows, num_tokens, num_tokens]` fp32 of ones and zeros.
    """
    mask = torch.zeros(batch.ids.shape[0], batch.ids.shape[1], batch.ids.shape[1])
    first = (batch.ids == image_token).int().argmax(1)
    for row, position in torch.nonzero(batch.looks >= 0).tolist():
        key = int(first[row]) + cell_offset(int(batch.looks[row, position]))
        mask[row, position, [key, key + GLOBAL_VIEW]] = 1
    return mask


def compare_loss(attentions: tuple[torch.Tensor, ...], batch: Batch, directions: torch.Tensor) -> torch.Tensor:
    """Guide one head to each of the two shapes that a question compares: `is the red star left or right of the …`.

    Args:
        attentions: Attention weights by layer, `[num_rows, num_heads, num_tokens, num_tokens]`.
        batch: The rows; the names of the shapes are the positions of questions that look at a cell.
        directions: Token ids of the answers.
    """
    answers = torch.isin(batch.labels, directions)
    names = (batch.looks >= 0) & (batch.labels < 0)
    found = []
    for row, position in torch.nonzero(answers).tolist():
        pair = torch.nonzero(names[row, :position]).flatten()[-2:].tolist()
        for head, name in zip(COMPARE_HEADS, pair, strict=False):
            found.append(attentions[COMPARE_LAYER][row, head, position, name])
    return -torch.log(torch.stack(found) + 1e-4).mean() if found else attentions[0].new_zeros(())


class PlaceHeads(nn.Module):
    """Predicts the centre of a shape from picture embeddings, and from its name in questions.

    Names are probed before the layer that compares them. The order of a description needs only how far left a shape
    is; without these heads the projection loses how high it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, 2)
        self.name = nn.Linear(width, 2)

    def loss(
        self, embeds: torch.Tensor, hidden_states: tuple[torch.Tensor, ...], batch: Batch, scenes: list[Scene]
    ) -> torch.Tensor:
        """Sum the squared errors of the centres, as shares of the side, of shapes that end in a cell alone.

        Args:
            embeds: Projected pictures, `[num_scenes, num_image_tokens, width]`.
            hidden_states: What each layer of the language model gets, `[num_rows, num_tokens, width]`.
            batch: The rows, one for each scene.
            scenes: What the pictures show.
        """
        shapes = {(i, shape.cell): shape for i, scene in enumerate(scenes) for shape in _alone_in_cell(scene)}
        seen = embeds[[i for i, _ in shapes], [cell_offset(cell) for _, cell in shapes]]
        loss = _place_error(self.cell(_normed(seen)), list(shapes.values()))
        names = torch.nonzero((batch.looks >= 0) & (batch.labels < 0)).tolist()
        named = {(i, p): shapes[i, cell] for i, p in names if (i, cell := int(batch.looks[i, p])) in shapes}
        if named:
            found = hidden_states[COMPARE_LAYER][[i for i, _ in named], [p for _, p in named]]
            loss = loss + _place_error(self.name(_normed(found)), list(named.values()))
        return loss


def _normed(hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(hidden, hidden.shape[-1:])


def _place_error(found: torch.Tensor, shapes: list[Shape]) -> torch.Tensor:
    return nn.functional.mse_loss(found, torch.tensor([[shape.x / SIDE, shape.y / SIDE] for shape in shapes]))


def _alone_in_cell(scene: Scene) -> list[Shape]:
    return [shape for shape in scene.shapes if sum(other.cell == shape.cell for other in scene.shapes) == 1]


def cell_token_loss(
    embeds: torch.Tensor, token_embeddings: torch.Tensor, scenes: list[Scene], tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Draw the embedding of each cell with one shape towards the tokens of its size, color and kind.

    Args:
        embeds: Picture embeddings, `[num_scenes, 41, hidden_size]`.
        token_embeddings: `[vocab_size, hidden_size]`.
        scenes: What the pictures show.
        tokenizer: The tokenizer, in which each of these words is one token.
    """
    shapes = [(i, shape) for i, scene in enumerate(scenes) for shape in _alone_in_cell(scene)]
    seen = embeds[[i for i, _ in shapes], [cell_offset(shape.cell) for _, shape in shapes]]
    seen = nn.functional.normalize(seen, dim=-1)
    loss = seen.new_zeros(())
    for words, name in ((SIZES, "size"), (COLORS, "color"), (SHAPES, "kind")):
        tokens = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
        logits = 12 * seen @ nn.functional.normalize(token_embeddings[tokens], dim=-1).T
        targets = torch.tensor([list(words).index(getattr(shape, name)) for _, shape in shapes])
        loss = loss + nn.functional.cross_entropy(logits, targets)
    return loss

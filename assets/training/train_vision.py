"""Stage 4b: train the vision tower, its projection and `vision-lora` together on the frozen language model."""

import argparse
import random

import torch
from torch import nn

from mmlora.assets.training import pictures
from mmlora.assets.training.alignment import guide_loss
from mmlora.assets.training.grounding import PlaceHeads, cell_token_loss, compare_loss, look_mask
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS, embed_patches, image_embeds, patch_features, run_language_model
from mmlora.assets.training.pictures import TASKS, Question, Scene
from mmlora.assets.training.rows import Batch, Encoder, Row, Tokens, collate
from mmlora.assets.training.stages import attach_adapter, frozen_language_model, greedy, load_stage, prompt_embeds
from mmlora.assets.training.text_tasks import style
from mmlora.assets.training.train_patches import PatchHeads, pixels

IMAGE_TOKENS = 41
QUESTION_LAYERS = (1,)  # where a question finds the shapes it names, one layer before its answer looks for others


def _exchange(encoder: Encoder, question: Question, rng: random.Random, image: list[int]) -> Tokens:
    ids = encoder.text(style(question.text, rng))
    asked = Tokens([*ids, *image], [-1] * len([*ids, *image]), [] if image else _question_looks(encoder, question, ids))
    return asked + encoder.answer(question.answer, question.cells)


def _question_looks(encoder: Encoder, question: Question, ids: list[int]) -> list[int]:
    """Return for each token of a question the cell of the shape that it names last, or -1."""
    looks, start = [-1] * len(ids), 0
    for kind, cell in question.named:
        start = ids.index(encoder.text(f" {kind}")[0], start) + 1
        looks[start - 1] = cell
    return looks


def picture_row(encoder: Encoder, scene: Scene, image: list[int], rng: random.Random) -> Row:
    """Ask several questions about a picture, at least one of each task; four times in five the picture comes first."""
    wanted = [*TASKS, "count", "height", "height"]
    questions = [q for q in (pictures.ask(scene, task, rng) for task in wanted) if q is not None]
    if rng.random() < 0.8:
        blocks = [_exchange(encoder, question, rng, []) for question in questions]
        return Row(encoder.prompt([encoder.user, *image]), blocks)
    exchange = _exchange(encoder, rng.choice(questions), rng, image)
    return Row(blocks=[encoder.prompt([encoder.user]) + exchange])


def direction_ids(encoder: Encoder) -> torch.Tensor:
    """Return the token ids that answer a comparison."""
    return torch.tensor([encoder.text(word)[0] for word in ("left", "right", "above", "below")])


def picture_guide_loss(
    attentions: tuple[torch.Tensor, ...], batch: Batch, image_token: int, directions: torch.Tensor
) -> torch.Tensor:
    """Sum the guidance of answers and questions to cells, and of comparisons to the names in their questions."""
    is_answer = (batch.labels >= 0)[..., None]
    looks = look_mask(batch, image_token)
    guided = guide_loss(attentions, looks * is_answer) + guide_loss(attentions, looks * ~is_answer, QUESTION_LAYERS)
    return guided + compare_loss(attentions, batch, directions)


@torch.no_grad()
def evaluate_pictures(model: nn.Module, encoder: Encoder, per_task: int = 100) -> str:
    """Report exact-match accuracy by picture task on held-out scenes."""
    rng, report = random.Random("held-out pictures"), []
    image_token = model.config.vision_config.image_token_id
    for task in TASKS:
        right = 0
        for _ in range(per_task):
            scene, question = pictures.sample_picture_question(rng, task)
            ids = [encoder.user, *[image_token] * IMAGE_TOKENS, *encoder.text(question.text)]
            media = {image_token: image_embeds(model, pixels([scene]))}
            embeds = prompt_embeds(model, [[*ids, encoder.end, encoder.assistant]], media)
            right += encoder.text(question.answer) == greedy(model, embeds, encoder.end)[0]
        report.append(f"{task} {right / per_task:.3f}")
    return ", ".join(report)


def main() -> None:
    """Train the stage."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--size", type=int, default=32, help="pictures per batch")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    set_up(4)
    model, tokenizer = frozen_language_model(seed=4)
    encoder, rng = Encoder(tokenizer), random.Random(4)
    lora = attach_adapter(model, args.rank)
    warm = load_stage("patches")
    heads = PatchHeads(model.config.vision_config.hidden_size)
    heads.load_state_dict(warm["heads"])
    model.model.embed_tokens_extend.image_embed.img_processor.load_state_dict(warm["tower"])
    places = PlaceHeads(model.config.hidden_size)
    embed = model.model.embed_tokens_extend.image_embed.requires_grad_(True)
    projection = nn.ModuleList([embed.img_projection_up, embed.img_projection_down])
    marks = [embed.global_img_feature_extensor, embed.sub_img_feature_extensor]
    marks += [*heads.parameters(), *places.parameters()]
    optimizer = optimizer_for(
        [(embed.img_processor, 1.5e-3, 0.02), (projection, 4e-3, 0.02), (lora.layers, 4e-3, 0.1), (marks, 1e-3, 0.0)]
    )
    image_token = model.config.vision_config.image_token_id
    directions = direction_ids(encoder)

    def step_loss(step: int) -> torch.Tensor:
        scenes = [pictures.sample_scene(rng) for _ in range(args.size)]
        batch = collate([picture_row(encoder, scene, [image_token] * IMAGE_TOKENS, rng) for scene in scenes])
        patches = patch_features(model, pixels(scenes))
        embeds = embed_patches(model, patches)
        output = run_language_model(model, batch, {image_token: embeds})
        answered = nn.functional.cross_entropy(output.logits, output.labels)
        guided = picture_guide_loss(output.attentions, batch, image_token, directions)
        placed = places.loss(embeds, output.hidden_states, batch, scenes)
        drawn = cell_token_loss(embeds, model.model.embed_tokens.weight, scenes, tokenizer)
        if (step + 1) % 50 == 0:
            parts = {"answers": answered, "guide": guided, "cells": drawn, "places": placed}
            print(", ".join(f"{name} {part.item():.4f}" for name, part in parts.items()), flush=True)
        return answered + 0.3 * guided + 0.2 * drawn + 20 * placed + 0.4 * heads.loss(patches, scenes)

    trained = {"image_embed": embed, "lora": lora, "heads": heads, "places": places}
    checkpoint = Checkpoint(CHECKPOINTS / "vision.pt", trained, optimizer)
    train(
        checkpoint,
        step_loss,
        args.steps,
        evaluate=lambda: evaluate_pictures(model, encoder),
        log_every=50,
        evaluate_every=400,
    )


if __name__ == "__main__":
    main()

"""Stage 5: train the speech projection of the "vision" mode, and continue `vision-lora`, on spoken questions.

Both towers are frozen. Half of the rows are typed questions, so that the picture tasks are not forgotten.
"""

import argparse
import random
from typing import Any

import torch
from torch import nn

from mmlora.assets.training import pictures
from mmlora.assets.training.alignment import token_loss
from mmlora.assets.training.corpus import SPEECH, Corpus
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS, audio_hidden, image_embeds, project_audio, run_language_model
from mmlora.assets.training.rows import Encoder, Row, collate
from mmlora.assets.training.stages import attach_adapter, frozen_language_model, greedy, load_stage, prompt_embeds
from mmlora.assets.training.text_tasks import ANSWER_QUESTIONS
from mmlora.assets.training.train_ctc import ALPHABET, align_words, endless_batches
from mmlora.assets.training.train_patches import pixels
from mmlora.assets.training.train_vision import (
    IMAGE_TOKENS,
    direction_ids,
    evaluate_pictures,
    picture_guide_loss,
    picture_row,
)


def spoken_row(encoder: Encoder, answer: str, media: list[list[int]], rng: random.Random) -> Row:
    """Ask a spoken question about a picture: either may come first, a typed request after, before or not at all."""
    rng.shuffle(media)
    ids = [token for part in media for token in part]
    text = encoder.text(rng.choice(["", rng.choice(ANSWER_QUESTIONS)]))
    ids = [*text, *ids] if rng.random() < 0.2 else [*ids, *text]
    return Row(blocks=[encoder.prompt([encoder.user, *ids]) + encoder.answer(answer)])


@torch.no_grad()
def evaluate_spoken(model: nn.Module, encoder: Encoder, corpus: Corpus, limit: int = 200) -> str:
    """Report exact-match accuracy of spoken questions about pictures."""
    rng, right, total = random.Random("spoken"), 0, 0
    audio, image = model.config.audio_config.audio_token_id, model.config.vision_config.image_token_id
    for batch in corpus.batches(random.Random(0), 8_000):
        scenes, answers = zip(*[pictures.scene_for(item["text"], rng) for item in batch], strict=True)
        hidden = audio_hidden(model, corpus.load(batch))
        ids = [encoder.user, *[audio] * hidden.shape[1], *[image] * IMAGE_TOKENS, encoder.end, encoder.assistant]
        media = {audio: project_audio(model, hidden, "vision"), image: image_embeds(model, pixels(list(scenes)))}
        texts = greedy(model, prompt_embeds(model, [ids] * len(batch), media), encoder.end)
        right += sum(encoder.text(answer) == text for answer, text in zip(answers, texts, strict=True))
        total += len(batch)
        if total >= limit:
            break
    return f"spoken {right / max(1, total):.3f}"


def main() -> None:
    """Train the stage."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--frames", type=int, default=4_500, help="audio frames per batch")
    parser.add_argument("--size", type=int, default=16, help="pictures with typed questions per batch")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    set_up(5)
    model, tokenizer = frozen_language_model(seed=5)
    encoder, rng = Encoder(tokenizer), random.Random(5)
    speech, vision = load_stage("speech"), load_stage("vision")
    embed = model.model.embed_tokens_extend
    embed.audio_embed.load_state_dict(speech["audio_embed"])
    embed.image_embed.load_state_dict(vision["image_embed"])
    up, down = embed.audio_embed.up_proj_for_vision_speech, embed.audio_embed.down_proj_for_vision_speech
    up.load_state_dict(embed.audio_embed.up_proj_for_speech.state_dict())
    down.load_state_dict(embed.audio_embed.down_proj_for_speech.state_dict())
    head = nn.Linear(model.config.audio_config.hidden_size, len(ALPHABET))
    head.load_state_dict(speech["head"])
    lora = attach_adapter(model, args.rank)
    lora.load_state_dict(vision["lora"])
    projection = nn.ModuleList([up, down]).requires_grad_(True)
    optimizer = optimizer_for([(projection, 3e-3, 0.01), (lora.layers, 3e-3, 0.1)])
    corpus, held_out = Corpus(SPEECH / "questions"), Corpus(SPEECH / "seen")
    held_out.items = [item for item in held_out.items if item["kind"] == "picture"]
    batches = endless_batches(corpus, rng, args.frames)
    audio, image = model.config.audio_config.audio_token_id, model.config.vision_config.image_token_id
    directions = direction_ids(encoder)

    def step_loss(step: int) -> torch.Tensor:
        items: list[dict[str, Any]] = next(batches)
        asked = [pictures.scene_for(item["text"], rng) for item in items]
        typed = [pictures.sample_scene(rng) for _ in range(args.size)]
        with torch.no_grad():
            hidden = audio_hidden(model, corpus.load(items, rng))
            images = image_embeds(model, pixels([*[scene for scene, _ in asked], *typed]))
        tokens = [[audio] * hidden.shape[1], [image] * IMAGE_TOKENS]
        rows = [spoken_row(encoder, answer, list(tokens), rng) for _, answer in asked]
        rows += [picture_row(encoder, scene, tokens[1], rng) for scene in typed]
        batch = collate(rows)
        media = {audio: project_audio(model, hidden, "vision"), image: images}
        output = run_language_model(model, batch, media)
        guided = picture_guide_loss(output.attentions, batch, image, directions)
        texts = [item["text"] for item in items]
        words, aligned = [encoder.text(f" {text}") for text in texts], align_words(head, hidden, texts)
        drawn = token_loss(media[audio], model.model.embed_tokens.weight, words, aligned)
        answered = nn.functional.cross_entropy(output.logits, output.labels)
        if (step + 1) % 50 == 0:
            print(f"answers {answered.item():.3f} guide {guided.item():.3f} tokens {drawn.item():.3f}", flush=True)
        return answered + 0.2 * drawn + 0.3 * guided

    checkpoint = Checkpoint(CHECKPOINTS / "questions.pt", {"up": up, "down": down, "lora": lora}, optimizer)
    train(
        checkpoint,
        step_loss,
        args.steps,
        evaluate=lambda: f"{evaluate_spoken(model, encoder, held_out)}, {evaluate_pictures(model, encoder, 50)}",
    )


if __name__ == "__main__":
    main()

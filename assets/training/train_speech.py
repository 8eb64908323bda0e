"""Stage 3: train the audio tower, its speech projection and `speech-lora` together on the frozen language model."""

import argparse
import random
from typing import Any

import torch
from torch import nn

from mmlora.assets.training.alignment import guide_loss, guide_mask, sum_guide_loss, token_loss
from mmlora.assets.training.corpus import SPEECH, Corpus
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.metrics import word_errors
from mmlora.assets.training.model import CHECKPOINTS, audio_hidden, project_audio, run_language_model
from mmlora.assets.training.rows import Batch, Encoder, Row, collate
from mmlora.assets.training.stages import attach_adapter, frozen_language_model, greedy, load_stage, prompt_embeds
from mmlora.assets.training.text_tasks import ANSWER_QUESTIONS, TRANSCRIBE_QUESTIONS, style
from mmlora.assets.training.train_ctc import ALPHABET, align_words, ctc_loss, endless_batches

Item = dict[str, Any]


def speech_row(encoder: Encoder, item: Item, audio: list[int], rng: random.Random) -> Row:
    """Ask for the transcript and, if the clip is a sum, for its answer; three times in four the audio comes first."""
    exchanges = [(rng.choice(TRANSCRIBE_QUESTIONS), item["text"])]
    if item["kind"] == "sum":
        exchanges += [(question, item["answer"]) for question in rng.sample(ANSWER_QUESTIONS, 3)]
    exchanges = [(style(q, rng) if rng.random() < 0.3 else q, answer) for q, answer in exchanges]
    if rng.random() < 0.06:
        exchanges[0] = ("", item["text"])
    if rng.random() < 0.75:
        prefix = encoder.prompt([encoder.user, *audio])
        return Row(prefix, [encoder.prompt(encoder.text(q)) + encoder.answer(a) for q, a in exchanges])
    question, answer = rng.choice(exchanges)
    return Row(blocks=[encoder.prompt([encoder.user, *encoder.text(question), *audio]) + encoder.answer(answer)])


def speech_batch(encoder: Encoder, items: list[Item], audio: list[int], rng: random.Random) -> Batch:
    """Build the rows of clips of one length, whose placeholder tokens are `audio`."""
    return collate([speech_row(encoder, item, audio, rng) for item in items])


@torch.no_grad()
def transcribe(model: nn.Module, encoder: Encoder, corpus: Corpus, items: list[Item], question: str) -> list[str]:
    """Ask `question` about clips of one length and return the answers."""
    hidden = audio_hidden(model, corpus.load(items))
    audio_token = model.config.audio_config.audio_token_id
    ids = [encoder.user, *[audio_token] * hidden.shape[1], *encoder.text(question), encoder.end, encoder.assistant]
    embeds = prompt_embeds(model, [ids] * len(items), {audio_token: project_audio(model, hidden)})
    return encoder.tokenizer.batch_decode(greedy(model, embeds, encoder.end), skip_special_tokens=True)


def evaluate_speech(model: nn.Module, encoder: Encoder, limit: int = 1000) -> str:
    """Report word error rates of held-out clips and the exact match of spoken sums."""
    report = []
    for name in ("seen", "unseen"):
        clips, errors, words, right, sums = Corpus(SPEECH / name), 0, 0, 0, 0
        clips.items = clips.items[:limit]
        for batch in clips.batches(random.Random(0), 20_000):
            for item, text in zip(
                batch, transcribe(model, encoder, clips, batch, TRANSCRIBE_QUESTIONS[0]), strict=True
            ):
                errors += word_errors(item["text"], text)
                words += len(item["text"].split())
            asked = [item for item in batch if item["kind"] == "sum"]
            if asked:
                answers = transcribe(model, encoder, clips, asked, ANSWER_QUESTIONS[0])
                right += sum(item["answer"] == text for item, text in zip(asked, answers, strict=True))
                sums += len(asked)
        report.append(f"{name} WER {errors / words:.3f} sums {right / max(1, sums):.3f}")
    return ", ".join(report)


def main() -> None:
    """Train the stage."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--frames", type=int, default=6_000, help="frames per batch")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    set_up(3)
    model, tokenizer = frozen_language_model(seed=3)
    encoder, corpus, rng = Encoder(tokenizer), Corpus(), random.Random(3)
    embed = model.model.embed_tokens_extend.audio_embed
    warm = load_stage("ctc")
    embed.encoder.load_state_dict(warm["encoder"])
    head = nn.Linear(model.config.audio_config.hidden_size, len(ALPHABET))
    head.load_state_dict(warm["head"])
    lora = attach_adapter(model, args.rank)
    tower = embed.encoder.requires_grad_(True)
    projection = nn.ModuleList([embed.up_proj_for_speech, embed.down_proj_for_speech]).requires_grad_(True)
    optimizer = optimizer_for(
        [(tower, 1e-3, 0.01), (projection, 3e-3, 0.01), (lora.layers, 3e-3, 0.0), (head.parameters(), 1e-3, 0.01)]
    )
    corpus.items += [item for item in corpus.items if item["kind"] == "sum"]
    batches = endless_batches(corpus, rng, args.frames)
    audio_token = model.config.audio_config.audio_token_id

    def step_loss(step: int) -> torch.Tensor:
        items = next(batches)
        hidden = audio_hidden(model, corpus.load(items, rng))
        batch = speech_batch(encoder, items, [audio_token] * hidden.shape[1], rng)
        media = {audio_token: project_audio(model, hidden)}
        logits, labels, attentions, _ = run_language_model(model, batch, media)
        texts = [item["text"] for item in items]
        aligned = align_words(head, hidden, texts)
        guide = guide_mask(batch, audio_token, encoder.assistant, [encoder.text(t) for t in texts], aligned)
        guided = guide_loss(attentions, guide)
        sums = [encoder.text(item["answer"])[0] if item["kind"] == "sum" else None for item in items]
        summed = sum_guide_loss(attentions, batch, (audio_token, encoder.assistant), sums, aligned)
        words = [encoder.text(f" {text}") for text in texts]
        drawn = token_loss(media[audio_token], model.model.embed_tokens.weight, words, aligned)
        answered = nn.functional.cross_entropy(logits, labels)
        if (step + 1) % 25 == 0:
            print(
                f"answers {answered.item():.3f} guide {guided.item():.3f} "
                f"tokens {drawn.item():.3f} sums {summed.item():.3f}",
                flush=True,
            )
        return answered + 0.3 * (guided + summed) + 0.2 * drawn + 0.3 * ctc_loss(head, hidden, texts)

    checkpoint = Checkpoint(CHECKPOINTS / "speech.pt", {"audio_embed": embed, "lora": lora, "head": head}, optimizer)
    train(checkpoint, step_loss, args.steps, evaluate=lambda: evaluate_speech(model, encoder, 100), evaluate_every=400)


if __name__ == "__main__":
    main()

"""Train a tiny vision-language model that names what an image shows, so that tests can check that images arrive.

Run with the interpreter of `.venv-vllm`: train_tiny_vlm.py FOLDER. For one to three images with one figure each, the
model replies `red circle, blue square`, without an image `no picture`, whatever the text. The architecture is Idefics3,
which vLLM serves without torchvision. Training takes ten minutes; one thread and fixed seeds make it repeatable.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

COLOURS = {
    "red": (225, 25, 25),
    "green": (25, 165, 45),
    "blue": (35, 60, 225),
    "yellow": (240, 215, 35),
    "purple": (140, 35, 170),
}
SHAPES = ("circle", "square", "triangle")
NOTHING = "no picture"
SAMPLES = {
    "red circle": "jpg",
    "blue square": "webp",
    "green triangle": "gif",
    "yellow circle": "bmp",
    "purple square": "png",
}
SIDE = 32  # pixels; every image is scaled to a square of this side
PATCH = 8
SCALE = 2  # patches per side of the square that becomes one token
PICTURE_TOKENS = (SIDE // PATCH // SCALE) ** 2
MOST_PICTURES = 3
CONTEXT = 2048
RATE = 3e-3
SPREAD = 0.08  # of the initial weights; the usual 0.02 suits wide models and makes narrow ones learn slowly

PAD, START, END = "<pad>", "<|im_start|>", "<end_of_utterance>"
PICTURE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
#: The template puts a number after each image, by which the model distinguishes them.
NUMBERS = ["<1>", "<2>", "<3>", "<4>"]
TEMPLATE = (
    "{%- set pictures = namespace(count=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set pictures.count = pictures.count + 1 -%}"
    "{{- '<image><' ~ pictures.count ~ '>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<end_of_utterance>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SYSTEM = (
    "You are a helpful assistant.",
    "你是一个有用的AI助手，能够理解图像和文本。",
    "Name the colour and the shape of every figure.",
)
QUESTIONS = (
    "What is in the picture?", "What is in this image?", "What do you see?", "Describe this image.",
    "Which figure is it, and in which colour?", "What's in these images?", "Name what each picture shows.",
    "Which colour, which shape?", "Are the two pictures alike? Say what each shows.",
    "这张图片里有什么？", "请描述这张图片并分析其中的主要内容。", "这些图片里有什么？",
)  # fmt: skip
VOCABULARY = (
    "the a of and to in is it you that was for on are with as I his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use how said an each she tell does set three want air "
    "picture image colour shape figure red green blue yellow purple circle square triangle hello please answer"
)
WORDS = VOCABULARY.split()


def name_of(kind: int) -> str:
    colour, shape = divmod(kind, len(SHAPES))
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}"


KINDS = len(COLOURS) * len(SHAPES)


def draw(kinds: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw images of shape count x 3 x SIDE x SIDE, values 0 to 1, with the soft edges of scaled images."""
    count = len(kinds)
    y, x = np.mgrid[0:SIDE, 0:SIDE][:, None].astype(np.float32) + 0.5

    def column(low: float, high: float) -> np.ndarray[Any, Any]:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    stretch = np.exp(column(-0.2, 0.2))
    size = column(0.2, 0.36) * SIDE
    width, height = size * stretch, size / stretch
    dx = (x - (width + column(0, 1) * (SIDE - 2 * width))) / width
    dy = (y - (height + column(0, 1) * (SIDE - 2 * height))) / height
    shape = (kinds % len(SHAPES))[:, None, None]
    round_, box = np.hypot(dx, dy) - 1, np.maximum(abs(dx), abs(dy)) - 1
    triangle = np.maximum(dy - 1, abs(dx) - (dy + 1) / 2)
    outside = np.select([shape == 0, shape == 1], [round_, box], triangle) * size
    cover = np.clip(0.5 - outside / column(0.7, 1.5), 0, 1)[:, None]

    base = np.array(list(COLOURS.values()), np.float32)[kinds // len(SHAPES)]
    colour = np.clip(base + rng.normal(0, 16, base.shape), 0, 255)[:, :, None, None] / 255
    picture = cover * colour + (1 - cover) * backgrounds(count, rng)
    return np.clip(picture + rng.normal(0, 0.01, picture.shape), 0, 1).astype(np.float32)


def backgrounds(count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw white, black, grey and slightly tinted backgrounds, some with noise."""
    level = rng.choice([0.0, 0.5, 0.9, 1.0], (count, 1, 1, 1)) + rng.uniform(-0.1, 0.1, (count, 1, 1, 1))
    tint = rng.normal(0, 0.03, (count, 3, 1, 1))
    amount = rng.choice([0.0, 0.0, 0.12], (count, 1, 1, 1))
    noise = rng.normal(0, 1, (count, 3, SIDE, SIDE)) * amount
    return np.clip(level + tint + noise, 0, 1)


def paint(kind: int, rng: random.Random, size: tuple[int, int] | None = None) -> Image.Image:
    """Draw a held-out image of any size with another library."""
    width, height = size or (rng.randint(100, 300), rng.randint(100, 300))
    noise = np.random.default_rng(rng.getrandbits(32))
    level = rng.choice([0, 30, 128, 230, 255])
    ground = np.full((height, width, 3), level, np.float32) + rng.choice([0, 25]) * noise.normal(
        0, 1, (height, width, 3)
    )
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    share = rng.uniform(0.44, 0.68)
    w, h = share * width * rng.uniform(0.9, 1.1), share * height * rng.uniform(0.9, 1.1)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    colour = tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in list(COLOURS.values())[kind // len(SHAPES)])
    pen = ImageDraw.Draw(picture)
    match SHAPES[kind % len(SHAPES)]:
        case "circle":
            pen.ellipse((x, y, x + w, y + h), fill=colour)
        case "square":
            pen.rectangle((x, y, x + w, y + h), fill=colour)
        case _:
            pen.polygon([(x + w / 2, y), (x, y + h), (x + w, y + h)], fill=colour)
    return picture


def encoded(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Return the image after a round trip through a file format."""
    file = BytesIO()
    picture.save(file, rng.choice(["PNG", "JPEG", "WEBP"]))
    return Image.open(file).convert("RGB")


def save_samples(folder: Path, rng: random.Random) -> None:
    """Write one file in each format, named after its content: `red-circle-96x80.jpg`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, ending) in enumerate(SAMPLES.items()):
        width, height = 96 - 8 * number, 56 + 8 * number
        picture = paint([name_of(kind) for kind in range(KINDS)].index(name), rng, (width, height))
        picture.save(folder / f"{name.replace(' ', '-')}-{width}x{height}.{ending}")


def build_processor() -> Idefics3Processor:
    corpus = [*SYSTEM, *QUESTIONS, VOCABULARY, NOTHING, *(f"{name_of(k)}, {name_of(k)}" for k in range(KINDS))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[PAD, START, END, PICTURE, AROUND, GLOBAL, *NUMBERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, PICTURE, AROUND, GLOBAL, *NUMBERS],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    pictures = Idefics3ImageProcessor(
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(pictures, fast, image_seq_len=PICTURE_TOKENS, chat_template=TEMPLATE)


def conversation(pictures: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return words and images in any order; only the images determine the response."""
    match rng.randrange(3):
        case 0:
            text = rng.choice(QUESTIONS)
        case 1:
            text = " ".join(rng.choices(WORDS, k=rng.randint(0, 16)))
        case _:
            text = "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(0, 24)))
    parts = [{"type": "image"} for _ in range(pictures)]
    parts.insert(rng.choice([0, pictures, rng.randint(0, pictures)]), {"type": "text", "text": text})
    if pictures > 1 and rng.random() < 0.3:
        parts.insert(rng.randint(0, pictures), {"type": "text", "text": rng.choice(WORDS)})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    return messages


def answer_for(kinds: list[int]) -> str:
    return ", ".join(name_of(kind) for kind in kinds) or NOTHING


def build_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids(PICTURE),
        scale_factor=SCALE,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3,
            "image_size": SIDE, "patch_size": PATCH, "initializer_range": SPREAD,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
            "initializer_range": SPREAD, **ids,
        },
        **ids,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config)


def batch_of(
    size: int, pictures: int, processor: Idefics3Processor, rng: random.Random, noise: np.random.Generator
) -> dict[str, torch.Tensor]:
    tokenizer = processor.tokenizer
    kinds = noise.integers(0, KINDS, (size, pictures))
    shown = f"{AROUND}{GLOBAL}{PICTURE * PICTURE_TOKENS}{AROUND}"
    rows = []
    for row in kinds.tolist():
        prompt = processor.apply_chat_template(conversation(pictures, rng), add_generation_prompt=True)
        asked = tokenizer.encode(prompt.replace(PICTURE, shown), add_special_tokens=False)
        answered = tokenizer.encode(answer_for(row) + END, add_special_tokens=False)
        rows.append((asked + answered, [-100] * len(asked) + answered))
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }
    if pictures:
        batch["pixel_values"] = pixels_of(kinds.reshape(-1), noise).reshape(size, pictures, 3, SIDE, SIDE)
    return batch


def pixels_of(kinds: np.ndarray[Any, Any], noise: np.random.Generator) -> torch.Tensor:
    """Return the images as the image processor would prepare them."""
    return torch.from_numpy(draw(kinds, noise) * 2 - 1)


def fit(parameters: list[torch.nn.Parameter], steps: int, loss_of: Callable[[int], torch.Tensor]) -> None:
    """Minimise `loss_of` with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    began, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {recent / 100:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            recent = 0.0


def train_eyes(model: Idefics3ForConditionalGeneration, steps: int, *, seed: int) -> None:
    """Train the vision tower and its connector with a classifier instead of text, which is much cheaper."""
    noise = np.random.default_rng(seed)
    tower, connector = model.model.vision_model, model.model.connector
    head = torch.nn.Linear(model.config.text_config.hidden_size, KINDS)

    def loss_of(_step: int) -> torch.Tensor:
        kinds = noise.integers(0, KINDS, 64)
        features = connector(tower(pixels_of(kinds, noise)).last_hidden_state)
        return torch.nn.functional.cross_entropy(head(features.mean(1)), torch.from_numpy(kinds))

    fit([p for part in (tower, connector, head) for p in part.parameters()], steps, loss_of)


def train(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, steps: int, *, seed: int) -> None:
    rng, noise = random.Random(seed), np.random.default_rng(seed)

    def loss_of(step: int) -> torch.Tensor:
        # Single images first: the model must name figures before it can distinguish several images.
        pictures = 1 if step <= steps // 10 else rng.choice([0, 1, 2, 2, 3, 3, 3])
        loss: torch.Tensor = model(**batch_of(48 // max(pictures, 1), pictures, processor, rng, noise)).loss
        return loss

    fit(list(model.parameters()), steps, loss_of)


def accuracy(folder: Path, questions: int, *, seed: int) -> float:
    """Return the fraction of correct responses of the saved model with its own processor."""
    processor = Idefics3Processor.from_pretrained(folder)
    model = Idefics3ForConditionalGeneration.from_pretrained(folder).eval()
    rng, right = random.Random(seed), [0] * (MOST_PICTURES + 1)
    for number in range(questions):
        kinds = [rng.randrange(KINDS) for _ in range(number % (MOST_PICTURES + 1))]
        prompt = processor.apply_chat_template(conversation(len(kinds), rng), add_generation_prompt=True)
        inputs = processor(
            text=prompt, images=[encoded(paint(k, rng), rng) for k in kinds] or None, return_tensors="pt"
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs.to(model.dtype), max_new_tokens=64, do_sample=False)
        text = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right[len(kinds)] += text == answer_for(kinds)
    print("right answers by number of pictures:", right)
    return sum(right) / questions


def run(options: argparse.Namespace) -> None:
    """Train and save. Exit with an error if the result does not recognise images."""
    torch.set_num_threads(1)  # several threads add in a different order each time
    torch.manual_seed(options.seed)
    processor = build_processor()
    model = build_model(processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    model.train()
    train_eyes(model, options.eye_steps, seed=options.seed)
    train(model, processor, options.steps, seed=options.seed)
    target: Path = options.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        built = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(built)
        processor.save_pretrained(built)
        share = accuracy(built, options.questions, seed=options.seed + 1)
        print(f"held-out accuracy {share:.1%}")
        if share < 0.95:
            sys.exit("the model does not see well enough; it was not saved")
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where the model goes; replaced when it exists")
    parser.add_argument("--pictures", type=Path, help="where to write a few sample pictures")
    parser.add_argument("--eye-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.pictures:
        save_samples(options.pictures, random.Random(options.seed))
    if options.folder:
        run(options)


if __name__ == "__main__":
    main()

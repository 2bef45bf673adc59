"""Hugging Face model folders, read without loading the model: facts from config.json, and completeness of weights.

Error messages name files, never folders. Blocking: runs in a thread.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.families import NEEDED_TOKENS

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_MAX_HEADER_BYTES = 256 * 1024 * 1024
_VISION_KEYS = (
    "vision_config", "vision_tower", "mm_vision_tower", "visual", "image_token_id", "image_token_index",
    "img_processor", "vit_config",
)  # fmt: skip
_VIDEO_KEYS = ("video_token_id", "video_token_index")
_AUDIO_KEYS = ("audio_config", "audio_token_id", "audio_token_index", "audio_processor")
_TEXT_KEYS = ("text_config", "llm_config", "language_config")
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "model_max_length")


@dataclass(frozen=True)
class FolderFacts:
    """Facts about one model. None or 0: unknown.

    `tokens` holds those of `families.NEEDED_TOKENS` that the tokenizer has. `kv_values_per_token` is how many numbers
    a token adds to the cache over all layers. `labels` is the number of classes of a classifier.
    """

    model_type: str
    architectures: tuple[str, ...]
    context_length: int | None
    is_embedding: bool
    is_generative: bool
    has_vision: bool
    has_video: bool
    has_audio: bool
    template: str | None
    tokens: frozenset[str] | None
    kv_values_per_token: int
    weight_bytes: int
    labels: int | None = None
    hidden_size: int = 0
    layers: int = 0


def read_folder(folder: Path) -> FolderFacts:
    """Read the folder. Raises `ModelProblem` if a file is missing, damaged or truncated."""
    if not (folder / "config.json").exists() and (folder / "params.json").exists():
        return _mistral_format(folder)
    config = read_json(folder, "config.json")
    # Models with speech output keep the configuration of their text model in a section of its own.
    thinker = config["thinker_config"] if isinstance(config.get("thinker_config"), dict) else config
    text = next((thinker[k] for k in _TEXT_KEYS if isinstance(thinker.get(k), dict)), thinker)
    architectures = tuple(str(a) for a in config.get("architectures") or ())
    is_sentence_model = (folder / "modules.json").exists() or (folder / "config_sentence_transformers.json").exists()
    is_generative = any("CausalLM" in a or "ConditionalGeneration" in a or "LMHead" in a for a in architectures)
    return FolderFacts(
        model_type=str(config.get("model_type") or ""),
        architectures=architectures,
        context_length=_context_length(folder, config, text),
        is_embedding=is_sentence_model or (bool(architectures) and all(_only_embeds(a) for a in architectures)),
        is_generative=is_generative,
        has_vision=any(key in thinker for key in _VISION_KEYS) or _has_image_processor(folder),
        has_video=any(key in thinker for key in _VIDEO_KEYS),
        has_audio=any(key in thinker for key in _AUDIO_KEYS),
        template=_chat_template(folder),
        tokens=_tokens(folder),
        kv_values_per_token=_kv_values_per_token(text),
        weight_bytes=_check_weights(folder),
        labels=_labels(config),
        hidden_size=_number(text, "hidden_size", "n_embd"),
        layers=_number(text, "num_hidden_layers", "n_layer"),
    )


def _mistral_format(folder: Path) -> FolderFacts:
    """Read Mistral's own layout: params.json, consolidated weights, tekken.json with the chat template."""
    params = read_json(folder, "params.json")
    length = params.get("max_seq_len") or params.get("max_position_embeddings")
    return FolderFacts(
        model_type="mistral",
        architectures=(),
        context_length=length if isinstance(length, int) else None,
        is_embedding=False,
        is_generative=True,
        has_vision="vision_encoder" in params,
        has_video=False,
        has_audio="whisper_model_args" in params.get("multimodal", {}),
        template=None,
        tokens=None,
        kv_values_per_token=0,
        weight_bytes=_check_weights(folder),
    )


def read_json(folder: Path, name: str, *, whose: str = "the model's") -> dict[str, Any]:
    """Read a JSON object. Raises `ModelProblem`."""
    try:
        content = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise ModelProblem(f"{whose} folder has no {name}; is the path right, and the download complete?") from None
    except (ValueError, OSError) as error:
        raise ModelProblem(f"{whose} {name} cannot be read: {_brief(error)}") from None
    if not isinstance(content, dict):
        raise ModelProblem(f"{whose} {name} is not a JSON object")
    return content


def _brief(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def _only_embeds(architecture: str) -> bool:
    """Return whether an architecture such as `BertModel` or `…ForSequenceClassification` has no language model head."""
    return architecture.endswith(("Model", "ForSequenceClassification", "ForTextEncoding", "ForMaskedLM"))


def _labels(config: dict[str, Any]) -> int | None:
    count, names = config.get("num_labels"), config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    return count if isinstance(count, int) else None


def _has_image_processor(folder: Path) -> bool:
    """Return whether a processor file names an image processor, for models whose config.json has none of the keys."""
    for name, key in (
        ("preprocessor_config.json", "image_processor_type"),
        ("processor_config.json", "image_processor"),
    ):
        if (folder / name).exists() and key in read_json(folder, name):
            return True
    return False


def _context_length(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> int | None:
    lengths = [v for source in (text, config) for k in _LENGTH_KEYS if isinstance(v := source.get(k), int) and v > 0]
    sentence = folder / "sentence_bert_config.json"
    if sentence.exists():
        longest = read_json(folder, sentence.name).get("max_seq_length")
        lengths = [min([longest, *lengths])] if isinstance(longest, int) and longest > 0 else lengths
    return lengths[0] if lengths else None


def _chat_template(folder: Path) -> str | None:
    """Return the text of the templates; empty: there is none; None: it is part of the tokenizer."""
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text("utf-8", "replace")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if (folder / name).exists() and (template := read_json(folder, name).get("chat_template")):
                return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
    except OSError as error:
        raise ModelProblem(f"the model's chat template cannot be read: {_brief(error)}") from None
    return None if any(folder.glob("tekken*.json")) or any(folder.glob("tokenizer.model.v*")) else ""


def _tokens(folder: Path) -> frozenset[str] | None:
    """Return the needed tokens that the tokenizer has, found as text: parsing the vocabulary takes a second."""
    try:
        text = (folder / "tokenizer.json").read_bytes()
    except OSError:
        return None
    spellings = {token: {json.dumps(token, ensure_ascii=a).encode() for a in (True, False)} for token in NEEDED_TOKENS}
    return frozenset(token for token, forms in spellings.items() if any(form in text for form in forms))


def _kv_values_per_token(text: dict[str, Any]) -> int:
    layers = _number(text, "num_hidden_layers", "n_layer")
    heads = _number(text, "num_attention_heads", "n_head")
    if text.get("kv_lora_rank"):  # latent attention caches one compressed vector
        return layers * (_number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim"))
    head_dim = _number(text, "head_dim") or (_number(text, "hidden_size", "n_embd") // heads if heads else 0)
    return layers * (_number(text, "num_key_value_heads") or heads) * head_dim * 2


def _number(text: dict[str, Any], *names: str) -> int:
    return next((v for n in names if isinstance(v := text.get(n), int) and v > 0), 0)


def _check_weights(folder: Path) -> int:
    """Return the size of all weights. Raises `ModelProblem` if there are none, or a part is missing or truncated."""
    for index in sorted(folder.glob("*.index.json")):
        named = read_json(folder, index.name).get("weight_map")
        parts = set(named.values()) if isinstance(named, dict) else set()
        missing = sorted(p for p in parts if not (folder / str(p)).exists())
        if missing:
            raise ModelProblem(f"{len(missing)} of {len(parts)} weight files are missing, {missing[0]} among them")
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if not files:
        raise ModelProblem("the model's folder has no weights (*.safetensors or *.bin)")
    for file in files:
        if file.suffix == ".safetensors":
            read_safetensors(file)
    return sum(file.stat().st_size for file in files)


def read_safetensors(file: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors. Raises `ModelProblem` if the file is damaged or truncated.

    The header is 8 bytes of length and JSON with the offsets of every tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0  # noqa: PLR2004
        if not 0 < length <= min(size, _MAX_HEADER_BYTES):
            raise ModelProblem(f"{file.name} is damaged or cut off after {size} bytes")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ModelProblem(f"{file.name} is damaged: its header cannot be read") from None
    if size < expected:
        raise ModelProblem(f"{file.name} is cut off: {size} of {expected} bytes; fetch it again")
    return shapes

"""What only a GPU can tell: exactness in its kernels, and seconds and memory at the size of the 7B model.

    python benchmarks/gpu.py [--parts golden,conversation,...] [--tiny] [--json FILE]

`python -m pytest tests/gpu` runs the same parts and holds them to what must be true. Nothing is downloaded and nothing
but torch, transformers and pillow is needed: models are random, of the published shapes, and made on the device.

The parts:

- ``golden``: the vectors of the published model, in fp32 (TF32 off) and bf16, by every attention that is there: SDPA,
  torch's variable-length kernel, flash-attention;
- ``reuse``: the engine, turn by turn, against one forward pass over the whole conversation;
- ``batch``: conversations side by side against each alone;
- ``gradient``: a training step; packed samples against each alone;
- ``conversation``: the forced conversation of `multi_turn.py` through the published loop and ours, seconds per turn
  of encode, prefill and decode, work ratios; and the memory that it took, beside what `vilavt_core.sizing` plans;
- ``groups``: how encoding scales with the number of groups (`vision_groups.py`);
- ``training``: tokens per second, packed against padded (`packing.py`).

With ``--tiny`` every part runs at a size for CPUs; its seconds mean nothing. Every part that has ended is in FILE.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # also when a test imports it

import packing
import vision_groups
from multi_turn import (
    SMALL,
    STOP,
    TOKENS,
    Conversation,
    Size,
    compare,
    processor,
    random_model,
    run_ours,
    with_weights_in,
)

from vilavt_core.episode import Inquiry, Request
from vilavt_core.memory import SHAPES
from vilavt_core.sizing import GIB, Machine, PlannedTalk, plan
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, compat
from vilavt_hf.engine import Engine, EngineRow
from vilavt_hf.train.attention import PACKED
from vilavt_hf.train.training_model import VilavtForTraining
from vilavt_hf.vision_layout import TORCH_VARLEN

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CASES = ("a", "b", "c", "d", "e")
MINUTES = 10.0
"""What all parts together may take. Repeats are left out for it, and the figures say how many there were."""


TALK = Size(image=(54, 74), regions=((48, 48), (40, 56)))
"""The conversation at its real size: an image of 1036 x 756 pixels, crops of about 640 x 640."""


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and how large they are."""

    device: str = "cuda"
    conversation: str | None = "7b"
    """A shape of `vilavt_core.memory`; None is `multi_turn.SMALL`."""
    training: str | None = "3b"
    repeats: int = 2
    samples: int = 48
    """Of the training part."""
    scale: float = 1.0
    """Of their lengths."""
    minutes: float = MINUTES

    @property
    def dtype(self) -> torch.dtype:
        """What large models are in."""
        return torch.float32 if self.conversation is None else torch.bfloat16

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def talk(self) -> Size:
        """The forced conversation."""
        return SMALL if self.conversation is None else TALK

    def model(self, name: str | None, kind: type = VilavtForConditionalGeneration) -> Any:
        """A random model of a shape, made where it stays."""
        if name is None:
            small = random_model(SMALL)
            model = kind(small.config)
            model.load_state_dict(small.state_dict())
            return model.to(self.device).eval()
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return kind(VilavtConfig(**SHAPES[name] | TOKENS)).eval()
        finally:
            torch.set_default_dtype(before)


TINY = Setting(device="cpu", conversation=None, training=None, repeats=1, samples=6, scale=0.2)


@contextmanager
def exact() -> Iterator[None]:
    """fp32 without TF32, in matrix products and in the convolution of the patches."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def attentions(device: str) -> dict[str, str]:
    """Attention of the tower -> why it cannot be tried here, "" where it can."""
    on_gpu = "" if device.startswith("cuda") else "it needs CUDA"
    return {
        "sdpa": "",
        TORCH_VARLEN: on_gpu
        or ("" if find_spec("torch.nn.attention.varlen") else f"torch {torch.__version__} has none"),
        "flash_attention_2": on_gpu or ("" if find_spec("flash_attn") else "flash_attn is not installed"),
    }


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How far off: at most, by rms, and by rms in units of the expected values' own spread."""
    actual, expected = actual.detach().float().cpu(), expected.detach().float().cpu()
    off = actual - expected
    rms = float(off.pow(2).mean().sqrt())
    return {"max": float(off.abs().max()), "rms": rms, "relative": rms / float(expected.std())}


# ---------------------------------------------------------------------- exactness


def golden(setting: Setting) -> dict[str, Any]:
    """Features and logits of every golden vector: the worst over the cases, by precision and attention."""
    ways = {"fp32 sdpa": (torch.float32, "sdpa")}
    ways |= {
        f"bf16 {name}": (torch.bfloat16, name) for name, missing in attentions(setting.device).items() if not missing
    }
    found: dict[str, Any] = {}
    for way, (dtype, attention) in ways.items():
        model = VilavtForConditionalGeneration.from_pretrained(GOLDEN / "ckpt" / "tiny_late", dtype=dtype).eval()
        language = "sdpa" if attention == TORCH_VARLEN else attention  # that is a kernel of the tower
        model.set_attn_implementation(
            {"vision_config": attention, "text_config": language, "text_encoder_config": language}
        )
        model.to(setting.device)
        off = [_golden_case(model, name) for name in CASES]
        found[way] = {
            what: {key: max(case[what][key] for case in off) for key in ("max", "rms", "relative")}
            for what in ("features", "logits")
        }
    left_out = {name: missing for name, missing in attentions(setting.device).items() if missing}
    return {"ways": found, "left_out": left_out, "cases": list(CASES)}


@torch.inference_mode()
def _golden_case(model: Any, name: str) -> dict[str, dict[str, float]]:
    manifest = json.loads((GOLDEN / "out" / "manifest.json").read_text())
    entry = manifest["cases"][name]
    pixels = load_file(GOLDEN / "out" / "pixels.safetensors")
    tensors = load_file(GOLDEN / "out" / entry.get("file", f"{name}.safetensors"))
    inputs = {key.removeprefix("in."): v.to(model.device) for key, v in tensors.items() if key.startswith("in.")}
    inputs["pixel_values"] = torch.cat([pixels[image] for image in entry["images"]]).to(model.device)
    of_images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    with exact():
        features = torch.cat(tuple(compat.pooled(model.model.get_image_features(**of_images))))
        logits = model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    return {
        "features": deviation(features, tensors["out.vision_out"]),
        "logits": deviation(logits[attended], tensors["out.logits"][attended.cpu()]),
    }


class Several:
    """Forced conversations through one engine, with the logits that each token was chosen from."""

    def __init__(self, model: Any, talks: dict[str, Conversation]) -> None:
        self.talks = talks
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in talks}
        self._said = {name: [token for *_, said in talk.turns for token in said] for name, talk in talks.items()}
        inputs = Conversation(SMALL)
        for talk in talks.values():
            inputs.inputs.update(talk.inputs)
        self.engine = Engine(model, inputs.encode, choose=self._choose, max_batch_size=max(1, len(talks)))

    def _choose(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        forced = []
        for row, own in zip(rows, logits, strict=True):
            self.seen[row.name].append(own.clone())
            forced.append(self._said[row.name][len(self.seen[row.name]) - 1])
        return torch.tensor(forced, device=logits.device)

    def run(self) -> dict[str, torch.Tensor]:
        """Have all conversations at once; name -> (sampled tokens, vocabulary)."""
        rows = {name: self.engine.open(name=name) for name in self.talks}
        turns = {name: enumerate(talk.turns) for name, talk in self.talks.items()}
        shown: dict[str, tuple[Inquiry, ...]] = dict.fromkeys(self.talks, ())
        for name in self.talks:
            self._ask(rows[name], turns[name], shown)
        while self.engine.busy:
            for event in self.engine.step():
                if event.error is not None:
                    raise event.error
                if event.finish:
                    self._ask(event.row, turns[event.row.name], shown)
        return {name: torch.stack(logits) for name, logits in self.seen.items()}

    def _ask(self, row: EngineRow, turns: Iterator[tuple[int, Any]], shown: dict[str, tuple[Inquiry, ...]]) -> None:
        for turn, (new, added, said) in turns:
            shown[row.name] += tuple(added)
            request = Request(new, row.tokens + new, tuple(added), shown[row.name], len(said), (STOP,), (), turn)
            self.engine.submit(row, request)
            return


@torch.inference_mode()
def whole(model: Any, talk: Conversation) -> torch.Tensor:
    """The logits (sampled tokens, vocabulary) of one forward pass over the whole conversation."""
    tokens: list[int] = []
    places: list[int] = []
    for new, _, said in talk.turns:
        tokens += new
        places += range(len(tokens) - 1, len(tokens) + len(said) - 1)
        tokens += said
    inputs = talk.encode([inquiry for _, added, _ in talk.turns for inquiry in added])
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    ids = torch.tensor([tokens], device=model.device)
    logits = model(input_ids=ids, use_cache=False, **on_device).logits[0, places]
    return logits.float()


PEAKED = replace(SMALL, inquiries=4)
"""Exactness is tried on a small model whose attention is peaked, so that a wrong position or mask shows."""


def reuse(setting: Setting) -> dict[str, Any]:
    """The engine against one forward pass over everything; bf16 beside what rounding alone does to that pass."""
    model, talk = random_model(PEAKED).to(setting.device), Conversation(PEAKED)
    with exact():
        full = whole(model, talk)
        found = {"fp32": deviation(Several(model, {"a": talk}).run()["a"], full)}
        with_weights_in(model, torch.bfloat16)
        rounded = whole(model, talk)
        found["bf16"] = deviation(Several(model, {"a": talk}).run()["a"], rounded)
        found["bf16 rounding"] = deviation(rounded, full)
    return found


def batch(setting: Setting) -> dict[str, Any]:
    """Conversations of different lengths side by side against each alone."""
    sizes = {"a": PEAKED, "b": replace(PEAKED, inquiries=2, first_text=23), "c": replace(PEAKED, sampled=5, query=3)}
    talks = {name: Conversation(size, seed) for seed, (name, size) in enumerate(sizes.items())}
    model = random_model(PEAKED).to(setting.device)
    found: dict[str, Any] = {}
    with exact():
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            with_weights_in(model, dtype)
            together = Several(model, talks).run()
            alone = {talk: Several(model, {talk: talks[talk]}).run()[talk] for talk in talks}
            found[name] = deviation(torch.cat(list(together.values())), torch.cat(list(alone.values())))
            same = [(together[talk].argmax(-1) == alone[talk].argmax(-1)).float() for talk in talks]
            found[name]["same_greedy_token"] = float(torch.cat(same).mean())
    return found


def gradient(setting: Setting) -> dict[str, Any]:
    """One training step on packed samples: gradients against those of each sample alone, and the loss after it."""
    rng = packing.np.random.default_rng(0)
    examples = [packing.sample(rng, 0.2) for _ in range(6)]
    packed = packing.batches(examples, [list(range(len(examples)))], packed=True)
    alone = packing.batches(examples, [[i] for i in range(len(examples))], packed=False)
    model = packing.model_for(SMALL, PACKED).to(setting.device)
    found: dict[str, Any] = {}
    with exact():
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            with_weights_in(model, dtype)
            model.set_attn_implementation({"text_config": "sdpa"})
            loss_alone = packing.train(model, alone)
            expected = _gradients(model)
            if dtype == torch.float32:
                exactly = expected
            model.set_attn_implementation({"text_config": PACKED})
            loss = packing.train(model, packed)
            gradients = _gradients(model)
            similar = torch.nn.functional.cosine_similarity(gradients, expected, 0)
            found[name] = {
                "loss": loss,
                "loss_alone": loss_alone,
                "without_gradient": [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None],
                "finite": bool(gradients.isfinite().all()),
                "relative_difference": float((gradients - expected).norm() / expected.norm()),
                "cosine": float(similar),
                "rounding": float((expected - exactly).norm() / exactly.norm()),  # of this precision, samples alone
            }
        model.float()
        before = packing.train(model, packed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.grad is not None):
                parameter -= 0.01 / _gradients(model).norm() * parameter.grad
        found["loss_before_step"], found["loss_after_step"] = before, packing.train(model, packed)
    return found


def _gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------------- speed and memory


def conversation(setting: Setting) -> dict[str, Any]:
    """Both loops over the forced conversation, and what it took of memory."""
    model, size = setting.model(setting.conversation), setting.talk()
    talk, now = Conversation(size), setting.now
    run_ours(model, Conversation(replace(size, inquiries=1, sampled=4)), now)  # first calls set up kernels
    limit = 60 * setting.minutes / 3
    figures = compare(model, talk, setting.repeats, now, tolerance=float("inf"), limit=limit)
    turns = len(talk.turns)
    per_turn = {
        loop: {phase: value / turns for phase, value in phases.items()} for loop, phases in figures["seconds"].items()
    }
    return {"per_turn": per_turn, **figures, "size": asdict(size), "memory": memory(setting, model, talk)}


def memory(setting: Setting, model: Any, talk: Conversation) -> dict[str, Any]:
    """Bytes of weights, of keys and values, and at the peak of one conversation through our engine, measured and
    planned.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        element = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
        planned = plan(folder, Machine(), PlannedTalk(), dtype=element[setting.dtype])
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    _, row = run_ours(model, talk, setting.now)
    cached = len(row.tokens) - len(row.pending)
    kept = sum(t.numel() * t.element_size() for layer in row.layers or () for t in (layer.keys, layer.values))
    found: dict[str, Any] = {
        "weights": {"measured": weights, "planned": planned.weight_bytes},
        "kv_per_token": {"measured": kept / cached, "planned": planned.kv_bytes_per_token},
        "tokens": cached,
    }
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        keys = cached * planned.kv_bytes_per_token
        found["allocated_before"] = before
        found["peak"] = {
            "measured": peak,
            "planned": int(planned.weight_bytes + keys + Machine().reserve * GIB),
        }
        found["activations"] = {"measured": peak - before - keys, "planned": int(Machine().reserve * GIB)}
    return found


def groups(setting: Setting) -> dict[str, Any]:
    """`vision_groups.scaling` with every attention of the tower."""
    model = setting.model(setting.conversation).model
    found: dict[str, Any] = {}
    for name, missing in attentions(setting.device).items():
        if not missing and (name == "sdpa" or setting.dtype is not torch.float32):
            model.set_attn_implementation({"vision_config": name})
            found[name] = vision_groups.scaling(
                model, Size() if setting.conversation else SMALL, setting.repeats, setting.now
            )
    return found


def training(setting: Setting) -> dict[str, Any]:
    """`packing.compare`, activations computed anew in the backward pass."""
    model = setting.model(setting.training, VilavtForTraining).train()
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})

    def model_with(attention: str) -> VilavtForTraining:
        model.set_attn_implementation({"text_config": attention})
        return model

    tolerance = 1e-4 if setting.dtype is torch.float32 else 0.05
    warm_up = packing.sample(packing.np.random.default_rng(1), setting.scale)
    packing.train(model_with(PACKED), packing.batches([warm_up], [[0]], packed=True))
    limit = 60 * setting.minutes / 3
    return packing.compare(model_with, setting.samples, setting.scale, setting.repeats, setting.now, tolerance, limit)


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "golden": golden,
    "reuse": reuse,
    "batch": batch,
    "gradient": gradient,
    "conversation": conversation,
    "groups": groups,
    "training": training,
}


class Report:
    """Figures of the parts that have run, in one JSON file that is written anew after each."""

    def __init__(self, setting: Setting, file: Path | None = None) -> None:
        self.setting, self.file = setting, file
        on_gpu = setting.device.startswith("cuda")
        self.figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else processor(),
            "cuda": torch.version.cuda if on_gpu else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "setting": asdict(setting),
            "seconds": {},
        }

    def part(self, name: str) -> dict[str, Any]:
        """The figures of a part, which runs when it is first asked for."""
        if name not in self.figures:
            began = time.perf_counter()
            found = PARTS[name](self.setting)
            gc.collect()
            if self.setting.device.startswith("cuda"):
                torch.cuda.empty_cache()
            self.figures["seconds"][name] = time.perf_counter() - began
            self.figures[name] = found
            if self.file is not None:
                self.file.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        return self.figures[name]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--tiny", action="store_true", help="at a size for CPUs; its seconds mean nothing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every part")
    args = parser.parse_args()
    wanted = args.parts.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"there are no parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("torch sees no GPU; --tiny runs the same parts on the CPU, at a size whose seconds mean nothing")
    report = Report(replace(TINY if args.tiny else Setting(), minutes=args.minutes), args.json)
    for name in wanted:
        print(json.dumps({name: report.part(name)}, indent=1), flush=True)


if __name__ == "__main__":
    main()

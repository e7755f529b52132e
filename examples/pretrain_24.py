"""Pre-train a small Llama over bytes, its feed-forward layers 2:4: python examples/pretrain_24.py TEXTS OUT

TEXTS is a folder with one *.train.txt[.xz] and one *.valid.txt[.xz]; --method names the method. OUT gets log.jsonl, a
checkpoint that the same command resumes from to the bit, chart.svg with the curves of all runs beside OUT, and
model.safetensors, whose feed-forward weights are exactly 2:4 where the method ends so. For several GPUs:
torchrun --nproc-per-node 4 examples/pretrain_24.py ... --wrap fsdp
"""

import argparse
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pretrain import chart, text
from pretrain.loop import METHODS, Log, Run, Training, join, leave


def main(arguments: list[str] | None = None) -> float:
    """The validation loss of the finished model, in nats per byte."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    for field in fields(Run):
        kind = float if field.name in ("decay", "lr") else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp", help="how several GPUs share the model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="save and stop after that long")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    given = parser.parse_args(arguments)
    if given.method not in METHODS:
        parser.error(f"--method {given.method} is unknown; fix: one of {', '.join(METHODS)}")

    rank, _ = join()
    run = Run(**{field.name: getattr(given, field.name) for field in fields(Run)})
    training = Training(run, text.find(given.texts, "train"), given.out, given.wrap, given.compile)
    log = Log(given.out, training.step, given.tensorboard) if rank == 0 else lambda line: None
    done = training.train(log, given.seconds, given.save_every)
    training.finish() if done else None
    loss = training.evaluate(text.find(given.texts, "valid"))
    log({"step": training.step, "valid_loss": loss, "tokens": training.step * run.tokens // run.steps})

    whole = get_model_state_dict(training.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, given.out / "model.safetensors")
        logs = sorted(given.out.parent.glob("*/log.jsonl"))
        chart.draw({file.parent.name: chart.read(file) for file in logs}, given.out / "chart.svg")
    return loss


if __name__ == "__main__":
    main()
    leave()

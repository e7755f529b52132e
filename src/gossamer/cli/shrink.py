"""`gossamer plan` and `gossamer compress`."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..show import choice_table, console, duration, follow, plan_table, size
from . import app
from .writing import writing

if TYPE_CHECKING:
    from ..compress import Report
    from ..plan import Plan, Rule

Method = Annotated[str, typer.Option(help="auto, or one of gossamer.methods; auto measures and says why.")]
Ratio = Annotated[float, typer.Option(help="Compression ratio: 0.3 stores 30 % fewer bytes, masks counted.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="'PATTERN=METHOD:RATIO', '=METHOD', '=:RATIO' or '=dense'; the last match wins."),
]
Knobs = Annotated[list[str] | None, typer.Option("--knob", help="A knob of the method, as NAME=VALUE.")]
Codes = Annotated[str | None, typer.Option(help="Short for --knob codes=...: bitmask or nm24 (cospadi).")]

Target = Annotated[
    str | None, typer.Option(help="cpu: every layer in 4x1 blocks of int8, for encoders; takes the place of a method.")
]
Sparsity = Annotated[float, typer.Option(help="With --target: share of the blocks to remove.")]

BUILTIN, BUILTIN_SAMPLES, SAMPLES = "builtin", 128, 256
AT_ONCE = {"--rule", "--knob", "--calibration", "--samples", "--length", "--sequential", "--dtype"}  # no --distill
READS = 256  # tokens per calibration window of an encoder


@app.command()
def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder (only headers are read), hub id or GGUF.")],
    method: Method = "auto",
    ratio: Ratio = 0.3,
    rule: Rules = None,
    knob: Knobs = None,
    codes: Codes = None,
    target: Target = None,
    sparsity: Sparsity = 0.8,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the plan here, for compress --plan.")] = None,
) -> None:
    """Dry run: bytes before and after per layer, peak memory and time, before any work."""
    _check_target(ctx, target)
    made = _plan(_skeleton_or_model(model), method, ratio, rule, knob, codes, target, sparsity)
    if out:
        with writing(out):
            made.save(out)
    console.print(plan_table(made))
    seconds = made.seconds(SAMPLES * 1024)
    time = f", time on this CPU about {duration(seconds)} with {SAMPLES} x 1,024 tokens" if seconds else ""
    console.print(f"Estimated peak memory {size(made.peak_memory())}{time}.")
    if made.automatic:
        console.print("The method is chosen at compression time, when there are statistics to choose by.")


@app.command()
def compress(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Dense model: folder, hub id or GGUF.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the compressed model.")],
    method: Method = "auto",
    ratio: Ratio = 0.3,
    rule: Rules = None,
    knob: Knobs = None,
    codes: Codes = None,
    target: Target = None,
    sparsity: Sparsity = 0.8,
    distill: Annotated[Path | None, typer.Option("--distill", help="Text to learn from; with --target.")] = None,
    steps: Annotated[int, typer.Option(help="Of --distill, 16,384 tokens each.")] = 6000,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan from gossamer plan --json.")] = None,
    calibration: Annotated[str, typer.Option(help="Text file, or 'builtin'.")] = BUILTIN,
    samples: Annotated[int | None, typer.Option(help="Windows to calibrate on; 256, builtin 128.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    sequential: Annotated[bool, typer.Option("--sequential", help="Calibrate on compressed predecessors.")] = False,
    work: Annotated[Path | None, typer.Option(help="Work folder; default OUT.work, removed at the end.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the work folder holds.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str, typer.Option(help="Load the model as auto, float32, bfloat16 ...")] = "auto",
) -> None:
    """Compress a model; interrupt it whenever you like and run the same command to resume."""
    _check_out(out)
    _check_plan_alone(ctx, plan_file)
    _check_target(ctx, target)
    _check_windows(samples, length)
    if target and distill:
        _distill(model, out, read_text(distill), sparsity, steps, work, device, fresh)
        return
    text = _calibration_text(calibration)
    from .. import targets
    from ..checkpoint import save
    from ..compress import compress as run
    from ..hub.source import check_device, open_model
    from ..plan import Plan

    check_device(device)

    def planned(source: Any) -> Plan:
        if plan_file:
            return _checked(Plan.load(plan_file))
        return _checked(_plan(source, method, ratio, rule, knob, codes, target, sparsity))

    if plan_file or _headers_only(model):
        planned(_headers_only(model))  # what cannot work fails before the weights are read
    live, tokenizer = open_model(model, dtype)
    made = planned(live)
    length = min(length, READS) if target else length
    console.print(plan_table(made))
    out = out.resolve()
    place = work or out.with_name(out.name + ".work")
    count = samples if samples is not None else BUILTIN_SAMPLES if calibration == BUILTIN else SAMPLES
    how = {"samples": count, "length": length, "sequential": sequential, "device": device, "fresh": fresh}
    reports: list[Report] = []  # printed after the bars, which take over the terminal
    try:
        with follow() as progress:
            run(live, text, made, tokenizer=tokenizer, work=place, progress=progress, report=reports.append, **how)
        save(live, out, tokenizer=tokenizer)
    except KeyboardInterrupt:
        again = shlex.join(["gossamer", *(a for a in ctx.obj if a != "--fresh")])
        text = f"\nInterrupted; what is done is kept in {place}. Run the same command again to resume:\n  {again}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(130) from None
    _print_report(*reports)
    if work is None:
        shutil.rmtree(place)
    if target:
        targets.copy_pipeline(Path(model), out)
    console.print(f"Saved to {out}. Next: gossamer {'explain' if target else 'eval'} {out}")


def _distill(
    model: str, out: Path, text: str, sparsity: float, steps: int, work: Path | None, device: str | None, fresh: bool
) -> None:
    """Learn to be sparse; the checkpoint in the work folder is what a second call goes on from."""
    from .. import targets
    from ..checkpoint import save
    from ..hub.source import check_device, open_model

    check_device(device)
    live, tokenizer = open_model(model, "float32")
    place = (work or out.with_name(out.name + ".work")).resolve()
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = place / f"distill_{sparsity:g}_{steps}.pt"
    if fresh:
        checkpoint.unlink(missing_ok=True)

    def tell(step: int, losses: Any) -> None:
        console.print(f"step {step:,} of {steps:,}: loss {losses['loss']:.4f}, cosine {1 - losses['embedding']:.4f}")

    lines = [line for line in text.splitlines() if line.strip()]
    more = {"device": device, "checkpoint": checkpoint, "progress": tell}
    save(targets.distill(live, tokenizer, lines, sparsity, steps, **more).cpu(), out, tokenizer=tokenizer)
    targets.copy_pipeline(Path(model), out)
    if work is None:
        shutil.rmtree(place)
    console.print(f"Saved to {out}. Next: gossamer explain {out}")


def _print_report(report: Report) -> None:
    if report.choice:
        console.print(choice_table(report.choice), report.choice.reason, sep="\n")
    before, after = size(report.dense_bytes), size(report.stored_bytes)
    console.print(f"Block linears: {before} -> {after}, ratio {report.ratio:.4f}.")


def _plan(  # type: ignore[no-untyped-def]
    model: Any,
    method: str,
    ratio: float,
    rules: list[str] | None,
    knobs: list[str] | None,
    codes: str | None,
    target: str | None,
    sparsity: float,
):
    from .. import targets
    from ..plan import plan as make

    chosen = {**parse_knobs(knobs or []), **({"codes": codes} if codes else {})}
    parsed = [parse_rule(r) for r in rules or []]
    try:
        if target:
            return targets.cpu(model, sparsity, parsed, **chosen)
        return make(model, method, ratio, parsed, **chosen)
    except TypeError as e:  # an unknown knob
        raise ValueError(f"{e}; fix: leave it out") from e


def parse_knobs(pairs: list[str]) -> dict[str, Any]:
    """['rho=2', 'codes=nm24'] -> {'rho': 2, 'codes': 'nm24'}: values are JSON where they can be, else text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"--knob '{pair}' is not NAME=VALUE; fix: for example --knob rho=2.5")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def parse_rule(text: str) -> Rule:
    """'*.down_proj=sparsegpt:0.1' -> a Rule; method or ratio may be missing."""
    from ..plan import Rule

    pattern, equals, rest = text.rpartition("=")
    method, _, ratio = rest.partition(":")
    try:
        if not (pattern and equals and rest):
            raise ValueError
        return Rule(pattern, method or None, float(ratio) if ratio else None)
    except ValueError:
        raise ValueError(
            f"--rule '{text}' is not PATTERN=METHOD:RATIO; fix: for example --rule '*.down_proj=sparsegpt:0.1'"
        ) from None


def _skeleton_or_model(source: str) -> Any:
    from ..hub.source import open_model

    return _headers_only(source) or open_model(source)[0]


def _headers_only(source: str) -> Path | None:
    """A model folder that can be planned without reading its weights."""
    folder = Path(source)
    return folder if (folder / "config.json").is_file() else None


def _check_out(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; fix: choose another --out, or remove it")


def _check_plan_alone(ctx: typer.Context, plan_file: Path | None) -> None:
    options = {a.partition("=")[0] for a in ctx.obj}
    if plan_file and (given := options & {"--method", "--ratio", "--rule", "--knob", "--codes"}):
        raise ValueError(f"{min(given)} beside --plan, which says it already; fix: give it to `gossamer plan`")


def _check_windows(samples: int | None, length: int) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"--samples {samples} leaves nothing to calibrate on; fix: at least 1, or leave it out")
    if length < 2:
        raise ValueError(f"--length {length} leaves no token to look back at; fix: at least 2, better 1,024")


def _checked(made: Plan) -> Plan:
    if not made.jobs():
        raise ValueError("the plan leaves every layer dense; fix: rules that leave a layer to a method")
    return made


def _check_target(ctx: typer.Context, target: str | None) -> None:
    options = {a.partition("=")[0] for a in ctx.obj}
    if target not in (None, "cpu"):
        raise ValueError(f"there is no target '{target}'; fix: --target cpu")
    if target and (given := options & {"--method", "--ratio", "--codes", "--plan"}):
        raise ValueError(f"{min(given)} beside --target, which decides it; fix: leave one of them out")
    if "--distill" in options and (given := options & AT_ONCE):
        raise ValueError(f"{min(given)} is of pruning at once; fix: leave it out beside --distill")
    if not target and (given := options & {"--sparsity", "--distill", "--steps"}):
        raise ValueError(f"{min(given)} belongs to --target; fix: add --target cpu")


def _calibration_text(source: str) -> list[str]:
    from .. import texts

    return texts.calibration() if source == BUILTIN else [read_text(Path(source))]


def read_text(path: Path) -> str:
    """A UTF-8 text file, .xz or plain, with its line ends as they are. ValueError if it is neither."""
    import lzma

    data = path.read_bytes()
    try:
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as e:
        raise ValueError(f"{path} is no UTF-8 text ({e}); fix: convert it to UTF-8") from e

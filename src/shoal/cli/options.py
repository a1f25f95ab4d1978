"""The options that verbs share: each is defined once, and a verb names it."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Literal

import typer

from shoal.errors import UsageError

running: ContextVar[typer.Context] = ContextVar("running")
"""The verb that runs, with its options."""


def _config(context: typer.Context, value: Path | None) -> Path | None:
    """Values of a YAML file become the defaults of the options; what is typed wins."""
    running.set(context)
    if value is not None:
        import yaml

        from shoal.exchange._yaml import yaml_problem

        try:
            found = yaml.safe_load(value.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
            why = (error.strerror or error) if isinstance(error, OSError) else yaml_problem(error)
            raise _bad(UsageError(f"cannot read {value}: {why}", code="U649")) from None
        if not isinstance(found, dict):
            raise _bad(UsageError(f"{value} must hold option: value pairs", code="U649"))
        known = {parameter.name: parameter for parameter in context.command.params}
        found = {str(key).replace("-", "_"): v for key, v in found.items() if key != "verb"}
        for key in found:
            if key not in known:
                has = f"{context.info_name} has no option {key!r:.60}; it has {', '.join(known)}"
                raise _bad(UsageError(f"{value}: {has}", code="U649"))
            if getattr(known[key], "multiple", False) and not isinstance(found[key], list):
                found[key] = [found[key]]
        context.default_map = {**(context.default_map or {}), **found}
    return value


def _trackers(names: list[str] | None) -> list[str] | None:
    """Before anything is loaded: names that are none, and packages that are missing."""
    from shoal.report.tracking import require_trackers

    try:
        require_trackers(names or [])
    except UsageError as error:
        raise _bad(error) from None
    return names


def _bad(error: UsageError) -> typer.BadParameter:
    """A mistake found while the command line is read."""
    return typer.BadParameter(str(error))


Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or smollm2.", show_default=False)]
PlanText = Annotated[
    str | None, typer.Option("--plan", help="Depth notation (0-11,14-29) or a plan.json or its folder.")
]
DATA_HELP = "builtin, a file (text, .jsonl, .json, .csv, .parquet, .gz), FILE:KEY, a hub id, or a.jsonl=0.7,b.txt=0.3."
DataSource = Annotated[str, typer.Option("--data", help=DATA_HELP)]
TextKey = Annotated[
    str | None, typer.Option("--text-key", help="Key of the rows of --data (default: text, messages, prompt, ...).")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template", help="File of Jinja for conversations, or plain: contents alone (default: the model's)."
    ),
]
AdapterFolder = Annotated[
    Path | None, typer.Option("--adapter", help="Folder of a LoRA adapter of the model; it stays in while this runs.")
]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens in a calibration sequence.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Sequences at most.")]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens in a test window.")]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Tokens from window to window (default: no overlap).")
]
Bos = Annotated[bool, typer.Option("--bos", help="Put the BOS token in front of each window.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... (default: what torch finds).")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread MODEL over devices and disk: auto, balanced, or a .json file of module: device.",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-o", help="An option of the method, as name=value.")]
Then = Annotated[
    list[str] | None,
    typer.Option("--then", help="After that: a stand-in or merge, as refit or slerp:t=0.3 (shoal ls transforms)."),
]
Tokens = Annotated[str | None, typer.Option("--tokens", help="How long to heal: 200k, 1.5M.")]
Minutes = Annotated[
    float | None, typer.Option("--minutes", help="Or about how long on this machine, turned into tokens.")
]
Watch = Annotated[str, typer.Option("--watch", help="A second text, looked at before and after healing.")]
SavePlan = Annotated[
    Path | None, typer.Option("--save-plan", help="Folder for plan.json and its weights; --plan takes it.")
]
PolicyText = Annotated[
    str | None,
    typer.Option(
        "--policy", help="Who decides at run time: exit:confidence=0.9 (shoal ls policies), or a policy.json."
    ),
]
KVCache = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Compress rows of the KV cache: minicache:start=16,keep=0.05 (shoal ls caches)."),
]
GraphNames = Annotated[
    list[str] | None,
    typer.Option(
        "--graph", help="The same logits by other products: norms, siblings (shoal ls graphs); again for more."
    ),
]
Chat = Annotated[bool | None, typer.Option("--chat/--raw", help="Use the chat template (default: if there is one).")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", help="A .jsonl file, or a task or .yaml file of lm-eval; once for each."),
]
TaskItems = Annotated[int, typer.Option("--task-items", min=1, help="Items of each task.")]
TestData = Annotated[str, typer.Option("--test-data", help="Text for the evaluation (its test split).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder, in one step at the very end.")]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest weight file.")]
ZeroParts = Annotated[bool, typer.Option("--zero-parts", help="Write dropped parts as zeroed tensors (saves nothing).")]
As = Annotated[
    Literal["stock", "planned"],
    typer.Option("--as", help="stock: any loader reads it; planned: every tensor once, loaded where Shoal is."),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Leave the layers in their files and read each when it runs: any size fits.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", callback=_trackers, help="Experiment tracker that is told as well: tensorboard, wandb, mlflow, ..."
    ),
]
GpusPerWorker = Annotated[
    float, typer.Option("--gpus-per-worker", min=0, help="GPUs of each worker, with --ray: 1, or 0.5 for two on one.")
]
StackName = Annotated[
    str | None, typer.Option("--stack", help="encoder, decoder, vision, text (default: the decoder, or the first).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; load no weights, write nothing.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_config, is_eager=True, help="YAML file with these options; typed ones win."),
]

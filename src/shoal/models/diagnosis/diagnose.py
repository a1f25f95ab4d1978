"""From the metadata of a checkpoint to what is wrong with it, and to the sound checkpoint that it can become."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from transformers import PreTrainedModel

from shoal.errors import ModelError, ShoalError
from shoal.models.beside_layers import announced
from shoal.models.diagnosis.beside import carried_layers, notes_of
from shoal.models.diagnosis.configs import Fields, depth_said, empty, made, text_of, with_depth
from shoal.models.diagnosis.finding import Diagnosis, Finding
from shoal.models.diagnosis.layers import Fit, Layers, layers_of
from shoal.models.diagnosis.metadata import CheckpointMetadata
from shoal.models.diagnosis.outside import TIE, compare_outside, report_missing, tied_raw
from shoal.models.diagnosis.repaired_config import RepairedConfig, all_fit, by_tensors, repaired_config, variants
from shoal.models.load import MAX_DEPTH
from shoal.models.matching_tensors import require_matching_tensors
from shoal.models.names import attributed
from shoal.models.old_buffers import old_buffers
from shoal.models.opened import open_model
from shoal.models.quantised import described_quantisation, quantisation_said
from shoal.models.renaming import renamed, state_shapes
from shoal.models.stacks import find_stacks
from shoal.models.unread_fields import notes_for


def diagnose(metadata: CheckpointMetadata, kept: Sequence[int] | None = None) -> Diagnosis:
    """Compare config, index and tensors of a checkpoint with each other.

    `kept`: the layers of the base that were kept, in the order in which they lie in the files, for folders that do not
    tell. Raises `ModelError` for what cannot be judged at all: M307 no causal language model, M303 a family without
    plans, M312 code of its own, M330 a config that its class refuses for other reasons than its depth, M331 tensors of
    another model, M332 a depth that no model has, M333 a quantised checkpoint, M334 `kept` that does not fit,
    M337 layers whose tensors lie in several places.
    """
    raw, source = metadata.config, metadata.source
    if (said := quantisation_said(raw)) is not None:
        raise ModelError(
            f"{source} is quantised ({described_quantisation(said)}); give the doctor the model before it was",
            code="M333",
        )
    first = _first(raw, metadata)
    if len(find_stacks(first)) > 1:
        return _several(metadata)
    layers, left_over, counts = _sorted(first, metadata)
    count = len(layers.numbers)
    if not 0 < count <= MAX_DEPTH:
        raise ModelError(f"{source} holds {count} layers; a model has 1 to {MAX_DEPTH}", code="M332")
    findings = list(metadata.findings)
    if layers.numbers != tuple(range(count)):
        findings.append(
            Finding("the numbering of the layers", _listed(layers.numbers), f"0-{count - 1}", "layers are renumbered")
        )
    config = repaired_config(raw, layers, source, tuple(kept) if kept is not None else None)
    if not config.unknown and not all_fit(config.raw, layers, source):
        config = by_tensors(config, layers, source) or config
    model = _built(config.raw, source, count)
    fit = Fit(model, open_model(model).stack(), layers)
    wrong = [slot for slot, n in enumerate(layers.numbers) if not fit.fits(layers.by_number[n], slot)]
    findings += config.findings(raw)
    strange = _layer_findings(fit, layers, () if config.unknown else wrong, findings)
    found = _finished(metadata, config, layers, strange, findings)
    places = renamed(model, metadata.tensors, state_shapes(model))
    silent = [file for file, one in places.items() if one.ignored or file in left_over]
    others = notes_for(model.config.get_text_config(decoder=True), source)
    return replace(found, notes=(*notes_of(layers, counts, silent), *others))


def _sorted(first: PreTrainedModel, metadata: CheckpointMetadata) -> tuple[Layers, set[str], dict[str, int]]:
    """The tensors by layer; old buffers, which are no part of them; what the config says of layers beside them."""
    said = depth_said(metadata.config)
    counts = announced(text_of(metadata.config)) or announced(metadata.config)
    layers = layers_of(
        first,
        open_model(first).stack(),
        metadata.tensors,
        metadata.source,
        depth=MAX_DEPTH if said is None else said,
        ahead=sum(counts.values()),
    )
    dtypes = {name: place.dtype for name, place in metadata.places.items()}
    left_over = old_buffers(first, metadata.tensors, dtypes)
    for number, tails in layers.by_number.items():
        for tail in [tail for tail in tails if f"{layers.prefix}{number}{tail}" in left_over]:
            del tails[tail]
    return layers, left_over, counts


def _first(raw: Fields, metadata: CheckpointMetadata) -> PreTrainedModel:
    """A model of the family, of the depth that the config says where it can."""
    said = depth_said(raw)
    depth = said if said is not None and 0 < said <= MAX_DEPTH else 1
    return _built(with_depth(raw, depth), metadata.source, depth)


def _several(metadata: CheckpointMetadata) -> Diagnosis:
    """A model of several stacks is compared with its files as a whole; nothing of it is mended."""
    config = made(metadata.config, metadata.source)
    findings = list(metadata.findings)
    try:
        require_matching_tensors(metadata.source, empty(config, metadata.source), metadata.tensors)
    except ModelError as error:
        findings.append(Finding("the tensors", str(error).partition(": ")[2], "those of the model of the config", None))
    return Diagnosis(tuple(findings), config, names={name: name for name in metadata.tensors})


def _built(raw: Fields, source: str, count: int) -> PreTrainedModel:
    """The model of `raw`, or of the first config near it of which one can be built. Raises M307, M330."""
    config = made(raw, source)
    try:
        return empty(config, source)
    except ModelError:
        for near in variants(raw, count):
            with suppress(ModelError):
                return empty(made(near, source), source)
        raise


def _layer_findings(fit: Fit, layers: Layers, wrong: Sequence[int], findings: list[Finding]) -> set[str]:
    """What is wrong inside layers that fit no config; returns the files' tensors that belong to no part of them."""
    strange: set[str] = set()
    for slot in wrong:
        number = layers.numbers[slot]
        missing, extra, shapes = fit.differences(layers.by_number[number], slot)
        start = f"{layers.prefix}{number}"
        findings += [Finding(f"the tensor {rest} of layer {slot}", "missing", "in a file", None) for rest in missing]
        for tail in shapes:
            shape = layers.by_number[number][tail]
            wanted = "the shape that the config says"
            findings.append(Finding(f"the tensor {start}{tail}", f"{list(shape or ())}", wanted, None))
        for tail in extra:
            mend = None if missing or shapes else "it is left out"
            findings.append(Finding(f"the tensor {start}{tail}", "there", "no part of the layer", mend))
            strange.add(f"{start}{tail}")
    return strange


def _finished(
    metadata: CheckpointMetadata, config: RepairedConfig, layers: Layers, strange: set[str], findings: list[Finding]
) -> Diagnosis:
    raw, source = config.raw, metadata.source
    whole = made(raw, source)
    model = empty(whole, source)
    stack = open_model(model).stack()
    outside: list[Finding] = []
    extra, missing, pairs = compare_outside(model, stack, layers, outside)
    if missing:
        tied = made(tied_raw(raw, True), source)
        again: list[Finding] = []
        if not compare_outside(empty(tied, source), stack, layers, again)[1]:
            outside, whole = again, tied
            model = empty(whole, source)
            outside.append(Finding(TIE, "false, without " + ", ".join(missing), "true", "it is set to true"))
        else:
            report_missing(missing, outside)
    findings += outside
    strange |= extra
    names = {name: name for name in layers.outside if name not in strange}
    for slot, number in enumerate(layers.numbers):
        for tail in layers.by_number[number]:
            if f"{layers.prefix}{number}{tail}" not in strange:
                names[f"{layers.prefix}{slot}{tail}"] = f"{layers.prefix}{number}{tail}"
    carried = carried_layers(layers) if announced(text_of(raw)) or announced(raw) else {}
    found = Diagnosis(
        tuple(findings), whole, config.changed(metadata.config), names | carried, pairs, config.base, config.kept,
        frozenset(carried),
    )  # fmt: skip
    if found.unrepairable or any(metadata.tensors[name] is None for name in found.names.values()):
        return found
    shapes = {new: shape for new, old in found.names.items() if (shape := metadata.tensors[old]) is not None}
    try:
        attributed(model, stack, shapes)
    except ShoalError as error:
        last = Finding("the tensors", str(error).partition(": ")[2], "those of the model of the config", None)
        return replace(found, findings=(*findings, last))
    return found


def _listed(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return text if len(text) <= 100 else f"{text[:97]}..."

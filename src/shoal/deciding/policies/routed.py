"""Routed: a learned gate at each layer says which tokens, or which sequences, run it."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from shoal.deciding.decisions import Decision, Soft, straight_through
from shoal.deciding.forward import ForwardView
from shoal.deciding.gate_adapter import DOWN, adapted, adapter_shapes
from shoal.deciding.gate_options import GateOptions, Relax, require_sound
from shoal.deciding.gate_reading import learns, once_for_rows, prompt_mean, state_read
from shoal.deciding.gating import gate_names, halved, with_gates
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import layer_list
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.executing.weights import Tensors
from shoal.plan import Plan, Run, Spec
from shoal.plan.sources import Fill
from shoal.plan.steps import PartName, decides, runs

EXAMPLES = PolicyExamples(
    deciding=(
        "routed:layers=1-2,bias=-1", "routed:layers=1-2,bias=-1,part=mlp", "routed:layers=1-2,bias=-1,part=halves",
        "routed:layers=2,bias=-1,fill=mask", "routed:layers=1,bias=-1,grain=row",
        "routed:layers=1,bias=-1,grain=row,part=mlp", "routed:layers=3,bias=-1,grain=none",
    ),
    never=("routed:bias=1", "routed:bias=1,part=halves", "routed:bias=1,grain=row", "routed:bias=0.1,part=mlp"),
    always={"routed:layers=1-2,bias=-1": "0,3", "routed:layers=1,bias=-1,part=mlp": "0,1a,2,3",
            "routed:layers=2-3,bias=-2,grain=none": "0,1"},
    refused=(
        Refusal("gates that have not learned", "routed", "U710", "route-1"),
        Refusal("a layer that is not there", "routed:layers=7,bias=1", "U581", "layer 7"),
        Refusal("a threshold of 1", "routed:threshold=1,bias=1", "U711", "threshold=1"),
        Refusal("no capacity", "routed:capacity=0,bias=1", "U711", "capacity=0"),
        Refusal("a temperature of 0", "routed:temperature=0,bias=1", "U711", "temperature=0"),
        Refusal("the mask of a whole sequence", "routed:grain=row,fill=mask,bias=1", "U711", "fill=mask"),
        Refusal("halves side by side", "routed:part=halves,bias=1", "U711", "layer 0", family="falcon"),
        Refusal("a fill for mlps", "routed:part=mlp,fill=mask,bias=1", "U711", "fill=mask"),
        Refusal("a loop that is not there", "routed:layers=again", "U711", "second time"),
        Refusal("an adapter in the place of an mlp", "routed:part=mlp,adapter=4,bias=1", "U711", "adapter=4"),
        Refusal("a start that is no number", "routed:initial_bias=inf,bias=1", "U711", "initial_bias=inf"),
        Refusal("tokens ranked by a gate that reads none", "routed:grain=none,relax=top-k,bias=1", "U711", "top-k"),
    ),
)  # fmt: skip
AGAIN = "again"
GATE = "route"
"""What the names of its gates begin with."""


def routed(
    plan: Plan,
    spec: Spec,
    *,
    layers: str = "",
    part: Literal["layer", "mlp", "halves"] = "layer",
    grain: Literal["token", "row", "none"] = "token",
    net: Literal["linear", "mlp"] = "linear",
    threshold: float = 0.5,
    scale: bool = False,
    relax: Relax = "straight-through",
    capacity: float = 0.5,
    temperature: float = 1.0,
    final_temperature: float | None = None,
    bias: float | None = None,
    fill: Literal["auto", "project", "copy", "mask"] = "auto",
    adapter: int = 0,
    initial_bias: float = 2.0,
) -> Policy:
    """Run a layer for the tokens that its gate lets through; the gates learn by `shoal heal`.

    At each gate g the score of a token is s = w . x + b for its state x [hidden], scaled to a root mean square of 1 in
    float32, so that a gate does not depend on the growth of the stream; with `net` mlp s = w . silu(V x) + b. The token
    runs the layer where sigmoid(s) > `threshold`, and keeps its state otherwise. `scale`: what the layer changes is
    multiplied by sigmoid(s), out = x + sigmoid(s) (f(x) - x). The tensors are g.weight [1, hidden] (with `net` mlp
    [1, hidden / 4] beside g.inner [hidden / 4, hidden]) and g.bias [1], and stand beside the plan's. `layers` (3-5,7)
    have gates; without them all of the plan but the first; layers=again: the runs that repeat a layer. `part`: layer;
    mlp, so that its attention always runs; or halves, a gate for each of the two. `grain`: token; row, one answer for
    each sequence, of the mean of x over the prompt's real tokens, kept until the sequence ends; none, the gate is its
    bias alone and reads nothing.

    In training hard decisions get gradients by `relax`: straight-through, h + s' - sg(s') with s' = sigmoid(s / T);
    gumbel, the same of s plus logistic noise (the difference of two Gumbel draws); soft, all run, with the weight s';
    sample, h drawn with probability s', which `reinforce` scores; top-k, the `capacity` of each row's tokens with the
    highest scores, while a predictor, g.causal [1, hidden] and g.causal_bias [1], learns who that is and decides behind
    training. T goes from `temperature` to `final_temperature` over the stage. `bias`: gates without tensors, which
    score it for every token: before anything has learned. A row decides before the first token that it writes, so no
    key is ever missing (`fill` auto: none); a token's keys and values are made of the state that was carried past the
    layer (auto: project), or nobody sees them (mask). `adapter`: who does not run a layer gets x + g.up . silu(g.down .
    x), of that inner width, in its place; with `scale` it is what the layer's output is mixed with. Gates begin to
    learn at the score `initial_bias` for every token: the higher, the less often noise shuts one.

    Source: a router for each token, with its keys kept: Zeng et al. 2023 (SkipLayer, arXiv 2311.15436); top-k: Raposo
    et al. 2024 (Mixture-of-Depths, arXiv 2404.02258); for a sequence: Jain et al. 2024 (FiRST, arXiv 2410.12513).

    How we differ: states are scaled before they are read, and the base stands still unless a recipe says otherwise.
    Behind training nothing is ranked: `threshold` decides, so that what is cached is what one pass computes. Raises
    U710 for gates without tensors and without `bias`, U711 for an option out of range, and for halves of layers whose
    mlp does not read what the attention wrote.
    """
    options = GateOptions(
        grain, net, bias, threshold, scale, relax, capacity, temperature,
        temperature if final_temperature is None else final_temperature, adapter, initial_bias,
    )  # fmt: skip
    require_sound(options, part, fill)
    if part == "halves":
        plan = halved(plan, spec)
    again = layers == AGAIN
    named = plan.layers()[0 if again else 1 :] if again or not layers else layer_list(layers)
    rule: Fill | None = None if grain == "row" or part == "mlp" else "project" if fill == "auto" else fill
    placed = with_gates(plan, spec, named, gate_names(GATE, again=again), rule)
    if again and not decides(placed.steps()):
        raise UsageError(
            f"routed: {plan} runs no layer a second time; give a plan with a loop, as 0-9,[10-19]x2,20-29", code="U711"
        )
    rows = grain == "row"
    made = (_OfMlpByRow if rows else _OfMlp) if part == "mlp" else _ByRow if rows else Routed
    return made(placed, options)


class Routed(Policy):
    """Asks a gate at each run."""

    def __init__(self, plan: Plan, options: GateOptions) -> None:
        super().__init__(plan)
        self.options = options
        self.gated = [run for run in runs(plan.steps()) if run.gate is not None]

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """Gates of one score that read nothing yet; an inner layer is drawn from torch's generator."""
        made = {name: torch.zeros(shape) for name, shape in self._shapes(spec).items()}
        for name, tensor in made.items():
            if name.endswith(".bias"):
                tensor.fill_(self.options.initial_bias)
            elif name.endswith((".inner", f".{DOWN}")):
                tensor.normal_(0, tensor.shape[1] ** -0.5)
        return made

    def check_tensors(self, tensors: Tensors, spec: Spec) -> None:
        if self.options.bias is not None:
            return
        for name, right in self._shapes(spec).items():
            found = tensors.get(name)
            if found is None:
                raise UsageError(
                    f"the gate {name.rpartition('.')[0]} has no tensor {name}, so it has not learned; train it (shoal "
                    "heal --recipe skip-layer), or give all gates one score (routed:bias=1)",
                    code="U710",
                )
            if tuple(found.shape) != right:
                raise UsageError(
                    f"{name} is {list(found.shape)} instead of {list(right)}; give the options with which the gates "
                    "learned (net, grain), or train them on this model",
                    code="U710",
                )

    def _shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The tensors of all gates."""
        hidden, made = spec.stack().hidden, dict[str, tuple[int, ...]]()
        inner = hidden if self.options.net == "linear" else max(1, hidden // 4)
        for gate in self._gates:
            if self.options.grain != "none":
                made[f"{gate}.weight"] = (1, inner)
                if self.options.net == "mlp":
                    made[f"{gate}.inner"] = (inner, hidden)
            made[f"{gate}.bias"] = (1,)
            if self.options.relax == "top-k":
                made[f"{gate}.causal"], made[f"{gate}.causal_bias"] = (1, hidden), (1,)
            made |= adapter_shapes(gate, hidden, self.options.adapter)
        return made

    @property
    def _gates(self) -> list[str]:
        return list(dict.fromkeys(run.gate for run in self.gated if run.gate is not None))

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision | Soft:
        scores = self._scores(run, forward, hidden)
        causal = self._causal(run, forward, hidden)
        answer = self._learned(scores, forward) if learns(forward) else self._hard(scores, causal)
        if forward.learning is not None:
            weight = answer.weight if isinstance(answer, Soft) else answer.to(scores.dtype)
            forward.learning.note("gates", weight.expand(forward.rows, forward.tokens))
            forward.learning.note("scores", scores.expand(forward.rows, forward.tokens))
            if causal is not None:
                forward.learning.note("causal", causal)
        return answer

    def instead(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor:
        return adapted(run.gate or "", forward.tensors, hidden) if self.options.adapter else hidden

    def _scores(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor:
        """Of each token, float32 [batch or 1, tokens]."""
        if self.options.bias is not None:
            return torch.full((1, forward.tokens), self.options.bias, device=hidden.device)
        own = self._own(run, forward, hidden, "weight", "inner", "bias")
        if self.options.grain == "none":
            return own["bias"].expand(1, forward.tokens)
        return self._read(run, own, state_read(hidden), forward)

    def _causal(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a predictor of the ranking says of each token, [batch, tokens]; None where nothing is ranked."""
        own = self._own(run, forward, hidden, "causal", "causal_bias")
        if self.options.relax != "top-k" or self.options.bias is not None:
            return None
        return (state_read(hidden.detach()) @ own["causal"].T + own["causal_bias"])[..., 0]

    def _read(self, run: Run, own: dict[str, torch.Tensor], state: torch.Tensor, forward: ForwardView) -> torch.Tensor:
        if "inner" in own:
            state = torch.nn.functional.silu(state @ own["inner"].T)
        return (state @ own["weight"].T + own["bias"])[..., 0]

    def _own(self, run: Run, forward: ForwardView, hidden: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
        full = {name: f"{run.gate}.{name}" for name in names}
        there = {name: forward.tensors[one] for name, one in full.items() if one in forward.tensors}
        return {name: one.to(hidden.device).float() for name, one in there.items()}

    def _hard(self, scores: torch.Tensor, causal: torch.Tensor | None) -> torch.Tensor | Soft:
        hard = scores > self._level if causal is None else causal > 0
        return Soft(hard, scores.sigmoid() * hard) if self.options.scale else hard

    def _learned(self, scores: torch.Tensor, forward: ForwardView) -> Soft:
        """The decision in training, with the weight through which its gradient flows."""
        learning, options = forward.learning, self.options
        assert learning is not None
        warm = options.temperature * (options.final_temperature / options.temperature) ** learning.progress
        level = self._level
        if options.relax in ("gumbel", "sample"):
            each = scores if options.grain == "token" else scores[..., :1]  # a sequence decides once
            drawn = torch.rand(each.shape, generator=learning.generator).clamp(1e-6, 1 - 1e-6).to(scores.device)
            scores, level = scores + drawn.log() - (1 - drawn).log(), 0.0
        probability = (scores / warm).sigmoid()
        hard = _highest(scores, options.capacity) if options.relax == "top-k" else scores > level
        if options.relax == "soft":
            return Soft(torch.ones_like(hard), probability)
        if options.scale:
            return Soft(hard, scores.sigmoid() * hard)
        if options.relax == "sample":
            return Soft(hard, hard.to(scores.dtype))
        return straight_through(hard, probability)

    @property
    def _level(self) -> float:
        """The score above which a token runs."""
        return math.log(self.options.threshold / (1 - self.options.threshold))


class _OfMlp(Routed):
    leaves_out: ClassVar[PartName] = "mlp"


class _ByRow(Routed):
    grain: ClassVar[Grain] = "row"
    consistent = True

    def _read(self, run: Run, own: dict[str, torch.Tensor], state: torch.Tensor, forward: ForwardView) -> torch.Tensor:
        def decide() -> torch.Tensor:
            return Routed._read(self, run, own, prompt_mean(state, forward), forward)

        return once_for_rows(str(run.gate), forward, decide).expand(-1, forward.tokens)


class _OfMlpByRow(_ByRow):
    leaves_out: ClassVar[PartName] = "mlp"


def _highest(scores: torch.Tensor, capacity: float) -> torch.Tensor:
    """Which tokens have the highest scores of their row, bool [batch or 1, tokens]."""
    count = max(1, round(capacity * scores.shape[-1]))
    chosen = scores.topk(count, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, value=True)

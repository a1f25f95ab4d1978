"""The next tokens of the requests of one batch, each drawn as `generate` draws for it alone."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from shoal.models.calls import device_of


@dataclass(frozen=True)
class _Draw:
    """How one request's tokens are drawn."""

    processors: LogitsProcessorList
    generator: torch.Generator | None
    """None: the likeliest token."""


class RequestSampling:
    """Stands in for the `ContinuousBatchingLogitsProcessorList` of transformers' continuous batching.

    Those know the newest token of a request alone and draw all from one generator. Here a request has the processors
    that `generate` makes for it, a repetition penalty among them, which read its whole text, and draws by its own seed:
    of each request that draws, the scores that are handed back leave one token. Requests are told apart by their names.
    """

    tensors_required = 0
    do_processing = True

    def __init__(self, model: Any) -> None:
        self._model, self._device = model, device_of(model)
        self._draws: dict[str, _Draw] = {}
        self._states: list[Any] = []
        self._lock = threading.Lock()

    def begin(self, name: str, prompt: tuple[int, ...], seed: int | None, settings: dict[str, Any]) -> GenerationConfig:
        """From now on tokens of the request `name` are drawn as `generate` draws with `settings`; its whole generation
        config. `seed`: None draws one."""
        config, _ = self._model._prepare_generation_config(None, **settings)
        eos = config.eos_token_id
        ids = torch.tensor([prompt], device=self._device)
        self._model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=self._device, batch_size=1)
        processors = self._model._get_logits_processor(
            config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, device=self._device
        )
        generator = None
        if config.do_sample:
            generator = torch.Generator(self._device)
            generator.manual_seed(secrets.randbits(63) if seed is None else seed)
        with self._lock:
            self._draws[name] = _Draw(processors, generator)
        config.eos_token_id = eos
        return config

    def end(self, name: str) -> None:
        """The request is over."""
        with self._lock:
            self._draws.pop(name, None)

    # what continuous batching calls

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Requests are added with none."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """No tensor is needed."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Called with the requests of the next forward."""
        self._states = [one.state for one in requests_in_batch if one.has_new_token]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Scores [requests, vocabulary] of the same shape, whose greatest are the tokens to take."""
        for row, state in enumerate(self._states):
            draw = self._draws.get(state.request_id)
            if draw is not None and (draw.processors or draw.generator is not None):
                scores[row] = self._drawn(draw, state, scores[row : row + 1])
        return scores

    def _drawn(self, draw: _Draw, state: Any, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([state.initial_tokens + state.generated_tokens], device=scores.device)
        scores = draw.processors(ids, scores)
        if draw.generator is None:
            return scores[0]
        token = torch.multinomial(scores.softmax(-1), 1, generator=draw.generator)[0]
        return torch.full_like(scores[0], -torch.inf).index_fill(0, token, 0.0)

"""The cache of a pipeline that keeps its own loop: which call it is at, and what it is answered.

A decoder does not see the latents, so once an encoder has run, the predictions of its whole segment
are known. They are made in one batch and handed out as the pipeline asks for them.

**How a generation is recognised.** `set_timesteps` makes a new tensor of timesteps, in every
diffusers scheduler, and every pipeline calls it once before its loop. So a generation is one tensor
object: while the scheduler still holds the same one, it is the same generation, and no error,
interruption or other number of steps in between can be overlooked, because nothing has to be told
when a generation ends. The tensor is kept alive here, so that another cannot take its identity. A
scheduler that a pipeline puts in the place of its own midway (Text2Video-Zero) begins anew, too.

**How a call is recognised.** The timestep that a pipeline hands to its denoiser is a view into that
tensor, so its place in memory is the number of the call. Nothing is looked up by value, which would
be ambiguous for solvers that repeat a timestep (Heun, PNDM) and would make a GPU wait. Pipelines
that hand over a copy are matched by value, from the call that is expected on. Either way each call
must follow the last one. A pipeline that calls its denoiser twice in a step, or out of order, is
refused before it can draw something wrong. Going back to the first call starts anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from encache.contract.target import most_rows
from encache.errors import EncacheError
from encache.model.backbone import Conditions
from encache.model.spec import NO_CUT
from encache.model.split import blend
from encache.runtime.blend import DEFAULT_STRIDE, Blend, ring_weights, slots_for
from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.key_calls import check_key_calls, named_key_calls, uniform_key_calls
from encache.runtime.plan import calls_within
from encache.runtime.settings import Policy


def key_calls_of(policy: Policy, name: str | None, first: int, num_calls: int) -> tuple[int, ...]:
    """The key calls of a generation that makes the scheduler's calls from `first` on.

    A stride counts from the first call that is made. Explicit key calls, and a published list by
    its name, are numbers of the scheduler's calls; the first call that is made is always one.

    Raises:
        PlanError: they do not fit to the number of calls.
    """
    if name is None and policy.key_calls is None:
        count = num_calls - first
        stride = min(policy.stride or DEFAULT_STRIDE, count)
        return tuple(first + call for call in uniform_key_calls(stride, count))
    calls = policy.key_calls if name is None else named_key_calls(name, num_calls)
    assert calls is not None
    checked = check_key_calls(calls, num_calls)
    return (first, *(call for call in checked if call > first))


class Segments:
    """What the last key calls gave, and the predictions that were made of it.

    Args:
        engines: what runs the denoiser.
        rule: the blend.
        timesteps: of all calls of the scheduler [N].
        key_calls: see `key_calls_of`.
        announced: the call before which the pipeline says that it ends. Calls behind it are decoded
            only when they are asked for after all.
        max_decode_batch: most rows of one decoder run.
    """

    def __init__(
        self,
        engines: Engines,
        rule: Blend,
        timesteps: Tensor,
        key_calls: tuple[int, ...],
        announced: int,
        max_decode_batch: int | None,
    ) -> None:
        self._engines = engines
        self._timesteps = timesteps.float()
        self._key_calls = key_calls
        self._announced = announced
        self._max_decode_batch = max_decode_batch
        self._num_slots = slots_for(rule, key_calls)
        self._nodes: dict[int, int] = {}  # the last key calls, and the slots that they fill
        self._ring: list[Tensor] = []
        self._ready: dict[int, Tensor] = {}
        self._shape: tuple[int, ...] = ()
        self._conditions: Conditions = {}

    def follows(self, latents: Tensor, conditions: Conditions) -> bool:
        """Whether a call is like the last key call, but for what the latents and residuals hold."""
        return tuple(latents.shape) == self._shape and same(
            self._without_residuals(conditions), self._conditions
        )

    def evaluate(self, call: int, latents: Tensor, conditions: Conditions, forget: bool) -> None:
        """Run the denoiser, or its encoder where it is cut, at a key call.

        Args:
            call: its number.
            latents: the denoiser's input.
            conditions: see `Backbone`.
            forget: whether what earlier key calls gave is of no use.
        """
        if forget:
            self._nodes.clear()
            self._ring = []
        self._shape = tuple(latents.shape)
        self._conditions = self._without_residuals(conditions)
        self._ready.clear()
        full = len(self._nodes) == self._num_slots
        slot = self._nodes.pop(next(iter(self._nodes))) if full else len(self._nodes)
        self._nodes[call] = slot
        self._timesteps = self._timesteps.to(latents.device)
        timestep = self._timesteps[call : call + 1]
        if self._engines.cut == NO_CUT:
            predicted = self._engines.denoise(latents, timestep, conditions)
            if not self._ring:
                # Weights of several digits do not suit half precision.
                dtype = torch.promote_types(predicted.dtype, torch.float32)
                shape = (self._num_slots, *predicted.shape)
                self._ring = [torch.zeros(shape, dtype=dtype, device=predicted.device)]
            self._ring[0][slot] = predicted
            return
        if self._engines.device.type == "meta":
            raise EncacheError(
                "The denoiser's weights are brought in layer by layer "
                "(enable_sequential_cpu_offload), which a cut cannot follow. Use "
                f"enable_model_cpu_offload, or the cut {NO_CUT}."
            )
        if not self._ring:
            self._ring = allocate_ring(self._engines, self._num_slots, latents.shape)
            for feature in self._ring:  # what is not filled yet weighs 0, and 0 * NaN is NaN
                feature.zero_()
        self._engines.encode(latents, timestep, conditions, self._ring, slot)

    def prediction(self, call: int) -> Tensor:
        """What the denoiser is to answer at a call."""
        if self._engines.cut == NO_CUT:
            return blend(self._weights(range(call, call + 1)), self._ring[0])
        if call not in self._ready:
            calls = self._decoded_with(call)
            weights, timesteps = self._weights(calls), self._timesteps[calls.start : calls.stop]
            together = self._engines.decode(self._ring, weights, timesteps, self._conditions)
            self._ready = dict(zip(calls, together.chunk(len(calls)), strict=True))
        return self._ready.pop(call)

    def _decoded_with(self, call: int) -> range:
        """The calls to decode in one batch from this one on."""
        stops = [*self._key_calls, self._announced, len(self._timesteps)]
        rows, target = self._shape[0], self._engines.target
        compiled = target.decode_calls if target else None
        most = calls_within(most_rows(compiled, rows, self._max_decode_batch), rows)
        stop = min(stop for stop in stops if stop > call)
        return range(call, stop if most is None else min(stop, call + most))

    def _without_residuals(self, conditions: Conditions) -> Conditions:
        known = [one.name for one in self._engines.conditions]
        return {name: conditions[name] for name in known if name in conditions}

    def _weights(self, calls: range) -> Tensor:
        rows = [ring_weights(self._nodes, self._num_slots, call) for call in calls]
        return torch.tensor(rows, dtype=torch.float32, device=self._ring[0].device)


class Generation:
    """One pass of a pipeline over its scheduler's calls; see above.

    Args:
        table: the scheduler's timesteps; the object itself says which generation it is.
        first: number of the call at which the pipeline begins.
        key_calls: where the denoiser, or its encoder, runs.
        segments: see `Segments`.
    """

    def __init__(
        self, table: Tensor, first: int, key_calls: tuple[int, ...], segments: Segments
    ) -> None:
        self.table = table
        self.first = first
        self.next = first
        self._key_calls = frozenset(key_calls)
        self._segments: Segments | None = segments
        #: What the ControlNet was told last, and the call at which that differed.
        self._control: Any = None
        self._changed: int | None = None

    def needs_control(self, call: int, inputs: Any) -> bool:
        """Whether the ControlNet runs at a call, which comes before the denoiser's.

        It does at key calls, and where what it is told changes, as at the end of its guidance.
        """
        changed = not same(inputs, self._control)
        if changed:
            self._control, self._changed = inputs, call
        return changed or call in self._key_calls

    def answer(self, call: int, latents: Tensor, conditions: Conditions) -> Tensor:
        """What the denoiser is to say at a call.

        A call whose inputs differ from its key call's in more than the latents, as when a callback
        changes the prompt or ends the guidance, becomes a key call itself.
        """
        assert self._segments  # there is no call after the last one
        changed = call == self._changed or not self._segments.follows(latents, conditions)
        if changed or call in self._key_calls:
            self._segments.evaluate(call, latents, conditions, forget=changed)
        prediction = self._segments.prediction(call)
        self.next = call + 1
        if self.next == len(self.table):
            self._segments = None  # frees its memory
        return prediction


class Cache:
    """Follows one pipeline from generation to generation.

    Args:
        pipe: gives the pipeline.
        open_engines: makes what runs the denoiser, as it is when a generation begins.
        policy: see `Policy`.
        key_calls: name of a published list of key calls, in place of the policy's.
        max_decode_batch: most rows of one decoder run.
        begin: called at the first call of each generation.
    """

    def __init__(
        self,
        pipe: Callable[[], Any],
        open_engines: Callable[[], Engines],
        policy: Policy,
        key_calls: str | None,
        max_decode_batch: int | None,
        begin: Callable[[], None],
    ) -> None:
        self._pipe = pipe
        self._open_engines = open_engines
        self._policy = policy
        self._key_calls = key_calls
        self._max_decode_batch = max_decode_batch
        self._begin = begin
        self._generation: Generation | None = None

    def needs_control(self, timestep: Any, inputs: Any) -> bool:
        """Whether the ControlNet must run at this timestep, on these inputs."""
        generation, call = self._arrive(timestep)
        return generation.needs_control(call, inputs)

    def answer(self, latents: Tensor, timestep: Any, conditions: Conditions) -> Tensor:
        """The prediction at this timestep: computed now, or with the last key call."""
        generation, call = self._arrive(timestep)
        self._generation = None  # an error must leave nothing behind
        prediction = generation.answer(call, latents, conditions)
        self._generation = generation
        # A copy, because the engines' own may be of inference mode.
        return prediction.to(latents).clone()

    def _arrive(self, timestep: Any) -> tuple[Generation, int]:
        """The generation and the call that a timestep belongs to."""
        scheduler = self._pipe().scheduler
        table, known = scheduler.timesteps, self._generation
        if known is not None and known.table is not table:
            known = None
        begin = getattr(scheduler, "begin_index", None)
        call = place_of(timestep, table, begin if known is None else known.next)
        if known is None or (call == known.first and known.next != known.first):
            known = self._generation = self._start(table, call)
        if call != known.next:
            raise EncacheError(
                f"This pipeline asks for call {call} where call {known.next} would be next. "
                "encache follows pipelines that call their denoiser once a step, in order: use it "
                "without the cache (encache.disable)."
            )
        return known, call

    def _start(self, table: Tensor, first: int) -> Generation:
        policy = self._policy
        keys = key_calls_of(policy, self._key_calls, first, len(table))
        # Stable Diffusion's pipelines announce it before their loop; others make all calls.
        calls = getattr(self._pipe(), "_num_timesteps", None) or len(table)
        segments = Segments(
            self._open_engines(), policy.blend, table, keys, first + calls, self._max_decode_batch
        )
        self._begin()
        return Generation(table, first, keys, segments)


def place_of(timestep: Any, table: Tensor, expected: int | None) -> int:
    """The number of the call that a timestep stands for.

    Args:
        timestep: a number, or a tensor of any shape that holds one number.
        table: the timesteps of all calls [N].
        expected: where to look first if it is no view into the table.

    Raises:
        EncacheError: it is none of the scheduler's.
    """
    if isinstance(timestep, Tensor) and _share_memory(timestep, table):
        return (timestep.storage_offset() - table.storage_offset()) // table.stride(0)
    values = set(timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep])
    known = table.tolist()
    places = [call for call, value in enumerate(known) if {value} == values]
    if not places:
        raise EncacheError(
            f"This pipeline asks its denoiser at timestep {', '.join(map(str, values))}, which is "
            "not one of its scheduler's, so the cache cannot follow it: encache.disable(pipe)."
        )
    return expected if expected in places else places[0]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.device == other.device
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and numbers are equal; tensors that are one object are."""
    if one is other:
        return True
    (ours, form), (theirs, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(map(_equal, ours, theirs))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return type(one) is type(other) and one == other

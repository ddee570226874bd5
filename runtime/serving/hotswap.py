"""The policies on the engine: leases of them, and the change from one active policy to the next while both serve.

    load -> probe -> activate -> drain -> unload

    load      check the directory (files, hashes, base, numbers), then have the engine load it under its own name
    probe     compare log-probs: they must differ from the base's and match the trainer's, because vLLM serves an
              adapter whose modules match nothing as the bare base, without an error (vLLM#34186)
    activate  new leases get it; leases under way keep the policy they have
    drain     find the loaded policies that no lease uses any more
    unload    remove them from the engine, except the active one, the retired one, so that a rollback loads nothing, and
              the two that were used last

Only `follow`, which watches the policy rows, and boot (`activate`, or the first lease) activate; everybody else writes
a row and may `wait_for` it.
A policy that cannot be loaded or fails the probe leaves the one before active.

Invariants: a lease is one policy from its beginning to its end; a leased policy is loaded; a name on the engine means
one immutable directory for ever, because the engine's prefix cache is keyed by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from memory.adapters import Manifest, digest_base, verify_adapter
from memory.errors import AdapterRefused
from memory.records.policies import Policies
from memory.schema import Policy
from runtime.engine.process import Engine
from runtime.errors import AdapterError, EngineError, EngineInMaintenance, PolicyError
from runtime.serving.policy import LeasedPolicy

log = structlog.get_logger()

READY_SECONDS = 180.0
"""How long a lease waits for an engine that restarts."""
RETRY_SECONDS = 1.0
TOLERANCE_NATS = 0.15
"""Largest mean distance between the engine's log-probs and the trainer's: both sum bfloat16 in different orders."""
LEAST_CHANGE_NATS = 1e-3
LEAST_SHARE_OF_CHANGE = 0.2
"""The least part of the change measured by the trainer that must be measured on the engine."""
NUM_IDLE_KEPT = 2
"""Adapters without a lease that stay loaded beside the active and the retired one."""


@dataclass
class LoadedPolicy:
    """One policy and its state on the engine. Only `HotSwap` changes it."""

    policy: Policy
    served_name: str
    """The engine's name for it: the adapter's, or the base's."""
    num_leases: int = 0
    is_loaded: bool = False
    """Whether it was loaded and passed the probe."""
    manifest: Manifest | None = None
    """The adapter's, once it was checked; None for the bare base."""
    last_used: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is loaded or unloaded."""

    @property
    def path(self) -> Path | None:
        """The adapter's directory; None for the bare base."""
        return Path(self.policy.adapter_path) if self.policy.adapter_path else None


@dataclass(frozen=True)
class Refusal:
    """A version that the follower could not activate, and the error."""

    version: int
    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class HotSwap:
    """Leases policies, and changes which one is active while leases of others go on."""

    def __init__(self, policies: Policies, engine: Engine, *, max_lora_rank: int = 32) -> None:
        self._policies = policies
        self._engine = engine
        self._max_lora_rank = max_lora_rank
        self._loaded: dict[int, LoadedPolicy] = {}
        """By version; with those that were unloaded since."""
        self._active: int | None = None
        self._retired: int | None = None
        self._swapping = asyncio.Lock()
        self._num_uses = itertools.count(1)
        self._unloading: set[asyncio.Future[None]] = set()
        self._base_digest: str | None = None
        self._closed_reason: str | None = None
        self._is_idle = asyncio.Event()
        self._followed = asyncio.Condition()
        """Notified when the follower activated or refused a version."""
        self._refusal: Refusal | None = None
        self.num_swaps = 0
        engine.on_restart = self.reload_adapters

    @property
    def active_version(self) -> int | None:
        """The version that new episodes get; None before the first activation."""
        return self._active

    @property
    def refusal(self) -> str | None:
        """The reason why the active row's policy is not the one that serves; None while it is."""
        return None if self._refusal is None else str(self._refusal)

    @property
    def model_temperature(self) -> float:
        """The base model's own sampling temperature."""
        return self._engine.model_temperature

    @property
    def loaded_versions(self) -> set[int]:
        # a copy: other threads read this
        return {version for version, loaded in list(self._loaded.items()) if loaded.is_loaded}

    @property
    def num_leases(self) -> int:
        return sum(loaded.num_leases for loaded in self._loaded.values())

    def close(self, reason: str) -> None:
        """Grant no lease until `open`: EngineInMaintenance is raised instead. Leases under way go on."""
        self._closed_reason = reason
        self._is_idle.clear()
        if not self.num_leases:
            self._is_idle.set()

    def open(self) -> None:
        """Grant leases again."""
        self._closed_reason = None

    async def wait_until_idle(self) -> None:
        """After `close`: wait until the last lease has ended."""
        await self._is_idle.wait()

    def _require_open(self) -> None:
        if self._closed_reason is not None:
            raise EngineInMaintenance(f"the engine is stopped for a while: {self._closed_reason}; ask again later")

    @contextlib.asynccontextmanager
    async def lease(self, version: int | None = None) -> AsyncIterator[LeasedPolicy]:
        """Yield the policy `version`, or the active one, loaded and probed; it stays loaded until the lease ends.

        Raises:
            UnknownPolicy: no policy has that version.
            AdapterError: its adapter cannot be loaded or failed the probe.
            EngineError: the engine does not come up; EngineInMaintenance: it is stopped on purpose.
        """
        self._require_open()
        await self._engine.wait_until_ready(READY_SECONDS)
        if version is None:
            if self._active is None:  # not booted yet
                await self.activate(self._policies.active().version)
            version = self._active
        assert version is not None
        loaded = self._entry_of(version)
        # It may have been closed during the waits above. No `await` between this check and the count, and the count
        # before any `await`: a counted lease keeps the policy loaded and the engine running.
        self._require_open()
        loaded.num_leases += 1
        loaded.last_used = next(self._num_uses)
        try:
            if not loaded.is_loaded:
                async with loaded.lock:
                    await self._load(loaded)
                    await self._probe(loaded)
            yield LeasedPolicy(loaded.policy, loaded.served_name, self._engine)
        finally:
            loaded.num_leases -= 1
            if loaded.num_leases == 0:
                self._unload_later()
            if not self.num_leases:
                self._is_idle.set()

    async def activate(self, version: int) -> None:
        """Make `version` the policy of all new leases. If this raises, the previous policy stays active.

        Called at boot (by the first lease, if that comes before) and by `follow`, the task that watches the table of
        policies. Everybody else makes the policy's row the active one and calls `wait_for`.

        Raises:
            UnknownPolicy: no policy has that version.
            AdapterError: its adapter cannot be loaded, or its log-probs are not those that the trainer measured.
            EngineError: the engine does not answer.
        """
        # Lock order: `_swapping`, then a policy's own lock; leases take only the latter.
        async with self._swapping:
            loaded = self._entry_of(version)
            loaded.last_used = next(self._num_uses)
            async with loaded.lock:
                await self._load(loaded)
                await self._probe(loaded)
                self._activate(loaded)
        for drained in self._drain():
            await self._unload(drained)

    async def follow(self) -> None:
        """Activate each policy whose row becomes the active one, until cancelled."""
        seen = -1 if self._active is None else self._active
        while True:
            # `seen`, not `_active`: a policy that was refused would be tried again without a pause.
            wanted = await self._policies.wait_for_change(seen)
            try:
                await self._engine.wait_until_ready(READY_SECONDS)
                await self.activate(wanted)
                seen = wanted
            # The edge of the swap loop: whatever is wrong with one policy must not keep the next from being followed.
            except Exception as error:
                self._refusal = Refusal(wanted, error)
                log.error("swap refused", wanted=wanted, active=self._active, error=self.refusal)
                if isinstance(error, EngineError):  # the engine failed, not the policy: try again
                    await self._notify()
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                seen = wanted
            await self._notify()

    async def wait_for(self, version: int) -> None:
        """Wait until this replica has activated `version`, whose row is the active one. `follow` must be running.

        Returns early if another row becomes active in the meantime.

        Raises:
            AdapterError, EngineError: the follower could not activate it.
        """
        while self._active != version and self._policies.active().version == version:
            if self._refusal is not None and self._refusal.version == version:
                raise self._refusal.error
            # With a time limit: a row that changes back before the follower looks leads to no notification.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS), self._followed:
                    await self._followed.wait()

    async def _notify(self) -> None:
        async with self._followed:
            self._followed.notify_all()

    async def reload_adapters(self) -> None:
        """Load the active, the retired and the leased policies again after a restart of the engine, which starts
        without adapters."""
        # A copy: leases add entries during the awaits below.
        for version, loaded in list(self._loaded.items()):
            loaded.is_loaded = False
            # The engine becomes ready only after this: a lease in here would wait for itself.
            if version not in (self._active, self._retired) and not loaded.num_leases:
                continue
            try:
                async with loaded.lock:
                    await self._load(loaded)
                    await self._probe(loaded)
            except AdapterError as error:  # only its own leases fail
                log.error("adapter refused after a restart", version=version, error=str(error))

    def _entry_of(self, version: int) -> LoadedPolicy:
        """Return the entry of a version, made at its first use; its adapter need not be loaded."""
        if version not in self._loaded:
            policy = self._policies.get(version)
            # For ever: vLLM's prefix cache is keyed by name and path, and a reused one answers from the old adapter
            # (vllm#42125).
            name = Path(policy.adapter_path).name if policy.adapter_path else self._engine.model
            self._loaded[version] = LoadedPolicy(policy, name)
        return self._loaded[version]

    async def _load(self, loaded: LoadedPolicy) -> None:
        """Check the adapter and have the engine load it; nothing to do for the bare base and a loaded one."""
        if loaded.is_loaded or loaded.path is None:
            return
        # Threads of two adapters may hash the base at once; both write the same digest.
        loaded.manifest = await asyncio.to_thread(self._verify, loaded.path)
        await self._engine.client.load_adapter(loaded.served_name, str(loaded.path.absolute()))

    def _verify(self, path: Path) -> Manifest:
        """Check the directory before the engine reads it: some broken adapters kill vLLM, others it serves as the base.

        Raises:
            AdapterError
        """
        if self._base_digest is None:
            if self._engine.model_path is None:
                raise AdapterError(
                    f"adapter {str(path)!r} cannot be checked against its base: the engine at {self._engine.url!r} "
                    "does not say where that is; name its directory with engine.model"
                )
            self._base_digest = digest_base(self._engine.model_path)
        try:
            return verify_adapter(path, base_digest=self._base_digest, max_rank=self._max_lora_rank)
        except AdapterRefused as refused:
            raise AdapterError(str(refused)) from refused

    async def _probe(self, loaded: LoadedPolicy) -> None:
        """Prove that the engine serves this adapter, and unload it again if it does not."""
        if not loaded.is_loaded and loaded.manifest is not None:
            try:
                await self._compare_logprobs(loaded.served_name, loaded.manifest)
            except AdapterError:
                with contextlib.suppress(AdapterError, EngineError):
                    await self._engine.client.unload_adapter(loaded.served_name)
                raise
            except PolicyError as error:
                raise EngineError(f"adapter {loaded.served_name!r} could not be proved: {error}") from error
        loaded.is_loaded = True

    async def _compare_logprobs(self, name: str, manifest: Manifest) -> None:
        """Raise AdapterError unless the engine's log-probs of the manifest's tokens are the trainer's, in nats."""
        expected = manifest.fingerprint
        token_ids = expected.token_ids
        if len(token_ids) < 2:
            raise AdapterError(f"adapter {name!r} cannot be proved: its manifest holds no fingerprint")
        # Both measured here and now: a fingerprint's base log-probs come from the trainer's kernels, whose rounding
        # differs.
        base = await self._engine.client.token_logprobs(self._engine.model, token_ids)
        served = await self._engine.client.token_logprobs(name, token_ids)
        change = mean_distance(served, base)
        wanted = mean_distance(expected.adapter_logprobs, expected.base_logprobs)
        # A NaN would pass both comparisons: `verify_adapter` has to reject weights that are not finite.
        if change < max(LEAST_CHANGE_NATS, LEAST_SHARE_OF_CHANGE * wanted):
            raise AdapterError(
                f"adapter {name!r} is served as the bare base: its log-probs differ by {change:.4f} nats "
                f"from the base's, the trainer measured {wanted:.4f}; do its module names match the base's?"
            )
        distance = mean_distance(served, expected.adapter_logprobs)
        if distance > TOLERANCE_NATS:
            raise AdapterError(
                f"adapter {name!r} is not served as it was trained: its log-probs are {distance:.4f} "
                f"nats from the trainer's, {TOLERANCE_NATS} are allowed; is the base the same?"
            )
        log.info("adapter proved", adapter=name, change_nats=change, distance_nats=distance)

    def _activate(self, loaded: LoadedPolicy) -> None:
        """Point new leases to it."""
        # Read anew: the verdict that promoted it may have decided on memory after it was first leased for evaluation.
        loaded.policy = self._policies.get(loaded.policy.version)
        version = loaded.policy.version
        if version != self._active:
            self._retired, self._active = self._active, version
            self.num_swaps += 1
            log.info("swapped", active=version, retired=self._retired)
        self._refusal = None

    def _drain(self) -> list[LoadedPolicy]:
        """Return the loaded adapters to unload: no lease uses them, they are neither active nor retired, and
        `NUM_IDLE_KEPT` others were used more recently. A lease that ends later drains again."""
        idle = [loaded for loaded in self._loaded.values() if loaded.path is not None and self._is_surplus(loaded)]
        idle.sort(key=lambda loaded: loaded.last_used)
        return idle[: max(0, len(idle) - NUM_IDLE_KEPT)]

    def _is_surplus(self, loaded: LoadedPolicy) -> bool:
        is_needed = loaded.num_leases or loaded.policy.version in (self._active, self._retired)
        return loaded.is_loaded and not is_needed

    async def _unload(self, loaded: LoadedPolicy) -> None:
        """Remove a drained adapter from the engine."""
        async with loaded.lock:
            if not self._is_surplus(loaded):
                return  # leased or activated while this waited for the lock
            loaded.is_loaded = False  # before the call: a lease that begins during it has to load the adapter again
            try:
                # The directory has to outlive this: vLLM may still read the files again for a call under way, and ends
                # altogether if they are gone.
                await self._engine.client.unload_adapter(loaded.served_name)
            except (EngineError, AdapterError) as error:  # a restart removes it as well
                log.warning("adapter was not unloaded", adapter=loaded.served_name, error=str(error))

    def _unload_later(self) -> None:
        """Unload drained adapters in the background: no answer waits for it."""
        unloading = asyncio.ensure_future(self._unload_drained())
        self._unloading.add(unloading)  # the event loop holds tasks only weakly
        unloading.add_done_callback(self._unloading.discard)

    async def _unload_drained(self) -> None:
        for drained in self._drain():
            await self._unload(drained)


def mean_distance(left: list[float], right: list[float]) -> float:
    """Return the mean absolute difference of two lists of log-probs, in nats."""
    if len(left) != len(right):
        raise AdapterError(
            f"a fingerprint of {len(right)} log-probs cannot be compared with {len(left)}: it is damaged"
        )
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / max(1, len(left))

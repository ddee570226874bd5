"""What the engine wears: which policy acts, who still acts with an older one, and how one takes over from the other.

    load -> probe -> point -> drain -> unload

    load     the directory is checked (files, hashes, base, numbers), then the engine loads it under the same name
    probe    its log-probs must differ from the base's and match those the trainer measured: an adapter whose modules
             match nothing would be served as the bare base, silently (vLLM#34186)
    point    new leases get it; those under way keep what they have
    drain    the old one waits until its last lease ends
    unload   not the one just retired, which stays a flip away; only what came before it

Refuses to know why a policy became active: it follows the rows. An adapter that is refused leaves the old one on.

Invariants: a lease is one policy from its beginning to its end; what is leased is loaded; a name on the engine means
one immutable directory for ever (the engine's prefix cache is keyed by it).
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
from runtime.serving.policy import Actor

log = structlog.get_logger()

READY_SECONDS = 180.0
"""How long a lease waits for an engine that restarts."""
RETRY_SECONDS = 1.0
TOLERANCE_NATS = 0.15
"""Mean distance allowed between the engine's log-probs and the trainer's: bfloat16, added up in another order."""
LEAST_CHANGE_NATS = 1e-3
LEAST_SHARE_OF_CHANGE = 0.2
"""Of the change that the trainer saw, at least this much must be seen on the engine."""
NUM_IDLE_KEPT = 2
"""Adapters kept on the engine beyond the active and the retired one, though nobody leases them now."""


@dataclass
class LoadedPolicy:
    """One policy as the engine wears it."""

    policy: Policy
    served_name: str
    num_leases: int = 0
    is_loaded: bool = False
    last_used: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is loaded or unloaded."""

    @property
    def path(self) -> Path | None:
        return Path(self.policy.adapter_path) if self.policy.adapter_path else None


class HotSwap:
    """Hands out actors, and changes which policy is the default while they act."""

    def __init__(self, policies: Policies, engine: Engine, *, max_lora_rank: int = 32) -> None:
        self._policies = policies
        self._engine = engine
        self._max_lora_rank = max_lora_rank
        self._outfits: dict[int, LoadedPolicy] = {}
        self._active: int | None = None
        self._retired: int | None = None
        self._swapping = asyncio.Lock()
        self._clock = itertools.count(1)
        self._tidying: set[asyncio.Future[None]] = set()
        self._base_digest: str | None = None
        self._closed_for: str | None = None
        self._is_idle = asyncio.Event()
        self.num_swaps = 0
        self.refusal: str | None = None
        """Why the newest active row is not what is worn; None while it is."""
        engine.on_restart = self.reload_adapters

    @property
    def active_version(self) -> int | None:
        """The version that new episodes get; None before the first swap."""
        return self._active

    @property
    def loaded_versions(self) -> set[int]:
        return {version for version, outfit in self._outfits.items() if outfit.is_loaded}

    @property
    def num_leases(self) -> int:
        return sum(outfit.num_leases for outfit in self._outfits.values())

    def close(self, reason: str) -> None:
        """Hand out no lease until `open`: EngineInMaintenance is raised instead. Leases under way are kept."""
        self._closed_for = reason
        self._is_idle.clear()
        if not self.num_leases:
            self._is_idle.set()

    def open(self) -> None:
        """Hand out leases again."""
        self._closed_for = None

    async def wait_until_idle(self) -> None:
        """After `close`: wait until the last lease has ended."""
        await self._is_idle.wait()

    def _require_open(self) -> None:
        if self._closed_for is not None:
            raise EngineInMaintenance(f"the engine is stopped for a while: {self._closed_for}; ask again later")

    @contextlib.asynccontextmanager
    async def lease(self, version: int | None = None) -> AsyncIterator[Actor]:
        """Hand out the policy `version`, or the active one, loaded and proved; it is kept so until the lease ends.

        Raises:
            UnknownPolicy: no policy has that version.
            AdapterError: its adapter was refused.
            EngineError: the engine does not come up; EngineInMaintenance: it is stopped on purpose.
        """
        self._require_open()
        await self._engine.wait_until_ready(READY_SECONDS)
        if version is None:
            if self._active is None:  # boot is the first swap
                await self.wear(self._policies.active().version)
            version = self._active
        outfit = self._outfit(version)
        self._require_open()  # closed while we waited: no await may come between this and the count
        outfit.num_leases += 1  # before anything is awaited: what is leased is not unloaded
        outfit.last_used = next(self._clock)
        try:
            await self._load(outfit)
            yield Actor(outfit.policy, outfit.served_name, self._engine)
        finally:
            outfit.num_leases -= 1
            if outfit.num_leases == 0:
                self._tidy_later()
            if not self.num_leases:
                self._is_idle.set()

    async def wear(self, version: int) -> None:
        """Make `version` the policy of every lease from now on. When it raises, the one before is still on.

        Raises:
            UnknownPolicy, AdapterError, EngineError
        """
        async with self._swapping:
            outfit = self._outfit(version)
            outfit.last_used = next(self._clock)
            await self._load(outfit)
            # The verdict that promoted it may have settled how it serves, after it was first leased to be measured.
            outfit.policy = self._policies.get(version)
            if version != self._active:
                self._retired, self._active = self._active, version
                self.num_swaps += 1
                log.info("swapped", active=version, retired=self._retired)
            self.refusal = None
        await self._unload_surplus()

    async def follow(self) -> None:
        """Wear whatever policy becomes active, for as long as this runs. Never returns."""
        seen = -1 if self._active is None else self._active
        while True:
            wanted = await self._policies.wait_for_change(seen)
            try:
                await self._engine.wait_until_ready(READY_SECONDS)
                await self.wear(wanted)
                seen = wanted
            # The swap loop's edge: whatever is wrong with one policy, the old one stays on, the next is still noticed.
            except Exception as error:
                self.refusal = f"{type(error).__name__}: {error}"
                log.error("swap refused", wanted=wanted, active=self._active, error=self.refusal)
                if isinstance(error, EngineError):  # the engine's trouble, not the policy's: try again
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    seen = wanted

    async def reload_adapters(self) -> None:
        """After a restart of the engine, which forgets its adapters: load again what is active, retired or leased."""
        for version, outfit in list(self._outfits.items()):
            outfit.is_loaded = False
            if version not in (self._active, self._retired) and not outfit.num_leases:
                continue
            try:
                await self._load(outfit)
            except AdapterError as error:  # its leases fail; the others need not
                log.error("adapter refused after a restart", version=version, error=str(error))

    def _outfit(self, version: int) -> LoadedPolicy:
        if version not in self._outfits:
            policy = self._policies.get(version)
            name = Path(policy.adapter_path).name if policy.adapter_path else self._engine.model
            self._outfits[version] = LoadedPolicy(policy, name)
        return self._outfits[version]

    async def _load(self, outfit: LoadedPolicy) -> None:
        """Have the engine serve the policy, proved; nothing to do for the bare base and for what is loaded."""
        if outfit.is_loaded or outfit.path is None:
            outfit.is_loaded = True
            return
        async with outfit.lock:
            if outfit.is_loaded:
                return
            manifest = await asyncio.to_thread(self._verify, outfit.path)
            await self._engine.load_adapter(outfit.served_name, str(outfit.path.absolute()))
            try:
                await self._prove(outfit, manifest)
            except AdapterError:
                with contextlib.suppress(AdapterError, EngineError):
                    await self._engine.unload_adapter(outfit.served_name)
                raise
            except PolicyError as error:
                raise EngineError(f"adapter {outfit.served_name!r} could not be proved: {error}") from error
            outfit.is_loaded = True

    def _verify(self, path: Path) -> Manifest:
        """Check the directory before the engine sees it: some adapters would kill it, others be served as the base."""
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

    async def _prove(self, outfit: LoadedPolicy, manifest: Manifest) -> None:
        """Raise AdapterError unless the engine's log-probs say that the adapter, this very one, is on."""
        expected = manifest.fingerprint
        token_ids = expected.token_ids
        if len(token_ids) < 2:
            raise AdapterError(f"adapter {outfit.served_name!r} cannot be proved: its manifest holds no fingerprint")
        base = await self._engine.token_logprobs(self._engine.model, token_ids)
        served = await self._engine.token_logprobs(outfit.served_name, token_ids)
        change = mean_distance(served, base)
        wanted = mean_distance(expected.adapter_logprobs, expected.base_logprobs)
        if change < max(LEAST_CHANGE_NATS, LEAST_SHARE_OF_CHANGE * wanted):
            raise AdapterError(
                f"adapter {outfit.served_name!r} is served as the bare base: its log-probs differ by {change:.4f} nats "
                f"from the base's, the trainer measured {wanted:.4f}; do its module names match the base's?"
            )
        distance = mean_distance(served, expected.adapter_logprobs)
        if distance > TOLERANCE_NATS:
            raise AdapterError(
                f"adapter {outfit.served_name!r} is not served as it was trained: its log-probs are {distance:.4f} "
                f"nats from the trainer's, {TOLERANCE_NATS} are allowed; is the base the same?"
            )
        log.info("adapter proved", adapter=outfit.served_name, change_nats=change, distance_nats=distance)

    def _tidy_later(self) -> None:
        """Unload what is surplus without anybody waiting for it: an answer must not depend on it."""
        tidying = asyncio.ensure_future(self._unload_surplus())
        self._tidying.add(tidying)  # the loop itself holds tasks weakly
        tidying.add_done_callback(self._tidying.discard)

    async def _unload_surplus(self) -> None:
        """Unload what nobody leases: all but the active and the retired one, and the few used last."""
        idle = [
            outfit
            for version, outfit in self._outfits.items()
            if outfit.is_loaded
            and outfit.path is not None
            and outfit.num_leases == 0
            and version not in (self._active, self._retired)
        ]
        idle.sort(key=lambda outfit: outfit.last_used)
        for outfit in idle[: max(0, len(idle) - NUM_IDLE_KEPT)]:
            async with outfit.lock:
                if outfit.num_leases or not outfit.is_loaded or outfit.policy.version in (self._active, self._retired):
                    continue  # somebody came while we waited
                outfit.is_loaded = False
                try:
                    await self._engine.unload_adapter(outfit.served_name)
                except (EngineError, AdapterError) as error:  # a restart forgets it as well
                    log.warning("adapter was not unloaded", adapter=outfit.served_name, error=str(error))


def mean_distance(left: list[float], right: list[float]) -> float:
    """Return the mean absolute difference, in nats."""
    if len(left) != len(right):
        raise AdapterError(
            f"a fingerprint of {len(right)} log-probs cannot be compared with {len(left)}: it is damaged"
        )
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / max(1, len(left))

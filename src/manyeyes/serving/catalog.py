"""The models that are served: which version answers a request, and how new versions take the place of old ones."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from manyeyes.errors import BundleError, ManyeyesError
from manyeyes.serving.folder import (
    FolderSettings,
    FoundBundle,
    Traffic,
    find_bundle,
    find_bundles,
    is_bundle,
    newest_first,
    read_settings,
)
from manyeyes.serving.jobs import Failure
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import Model

_log = logging.getLogger(__name__)
Versions = Mapping[str, Model]
# Loads the bundle at a URI under a name and a version (None: the bundle's own). Raises ManyeyesError.
Loader = Callable[[str, str | None, str | None], Awaitable[Model]]
# How a single bundle is listed; its name and version stand in the bundle.
_OWN = ""


@dataclass(frozen=True)
class Choice:
    """The version that answers, and one that answers beside it without being heard."""

    model: Model
    shadow: Model | None = None


class Catalog:
    """Keeps what lies at a URI loaded. Used from the event loop alone.

    Args:
        uri: a bundle, or a folder of models.
        load: makes a model of a bundle.
        traffic: settings by name of the model that go over those of serving.toml.
    """

    def __init__(
        self,
        uri: str,
        load: Loader,
        metrics: Metrics,
        *,
        keep_versions: int,
        traffic: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        self.models: dict[str, Versions] = {}
        self._uri = uri.rstrip("/")
        self._load = load
        self._metrics = metrics
        self._keep_versions = keep_versions
        self._overrides = traffic or {}
        self._is_bundle: bool | None = None
        self._settings = FolderSettings()
        # By (name, version) as listed: the model, and the stamp that it was loaded or refused with.
        self._loaded: dict[tuple[str, str], tuple[Model, str]] = {}
        self._refused: dict[tuple[str, str], str] = {}

    def choose(self, name: str | None, version: str | None, request_id: bytes | None) -> Choice | Failure:
        """Return the model for a request.

        Args:
            request_id: if the client gave one, the same id gets the same version.
        """
        models = self.models
        if name is None:
            name = self.default_name
            if name is None:
                return _unknown(f"there are several models: say ?model= with one of {', '.join(sorted(models))}", 400)
        versions = models.get(name)
        if versions is None:
            return _unknown(f"there is no model {name[:100]!r}; GET /v1/models lists them")
        if version is not None:
            if version not in versions:
                return _unknown(f"the model {name} has no version {version[:100]!r}; GET /v1/models lists them")
            return Choice(versions[version])
        traffic = self._settings.models.get(name)
        if traffic is None:
            return Choice(next(iter(versions.values())))
        default = self.default_version(name)
        canary = traffic.canary if traffic.canary in versions else None
        if canary is not None and _share_of(name, request_id) < traffic.canary_weight:
            default = canary
        shadow = versions.get(traffic.shadow) if traffic.shadow not in (None, default) else None  # type: ignore[arg-type]
        return Choice(versions[default], shadow)

    @property
    def default_name(self) -> str | None:
        """The model of requests that name none; None if there are several and no default."""
        if len(self.models) == 1:
            return next(iter(self.models))
        return self._settings.default_model if self._settings.default_model in self.models else None

    def default_version(self, name: str) -> str:
        """The version that answers requests of the model `name` unless the canary does."""
        versions = self.models[name]
        traffic = self._settings.models.get(name, Traffic())
        if traffic.default in versions:
            return str(traffic.default)
        on_trial = {traffic.canary, traffic.shadow}
        return next((version for version in versions if version not in on_trial), next(iter(versions)))

    def traffic(self, name: str) -> Traffic:
        """The settings of the model `name`."""
        return self._settings.models.get(name, Traffic())

    async def refresh(self) -> None:
        """Look at what lies there; load what is new, and only then let go of what has been replaced.

        Raises:
            ManyeyesError: there is nothing that can be served, or the settings can't be read.
        """
        found = await asyncio.to_thread(self._look)
        for name, versions in found.items():
            kept = 0
            for version in newest_first(versions):
                key, bundle = (name, version), versions[version]
                if kept >= self._keep_versions and version not in self.traffic(name).versions():
                    continue
                kept += await self._bring(key, bundle)
        await self._swap(self._wanted(found))
        if not self.models:
            raise BundleError(
                f"{self._uri} holds no model that can be served. "
                "Give a bundle, or a folder with NAME/VERSION/bundle.json."
            )

    async def close(self) -> None:
        """Let all models finish."""
        for model, _ in self._loaded.values():
            await model.close()

    async def _bring(self, key: tuple[str, str], bundle: FoundBundle) -> bool:
        """Load a bundle unless that was done or tried; True if this version is served, now or from before."""
        before = self._loaded.get(key)
        if (before is not None and before[1] == bundle.stamp) or self._refused.get(key) == bundle.stamp:
            return before is not None
        name, version = key
        try:
            model = await self._load(bundle.uri, name or None, version or None)
        except (ManyeyesError, OSError) as error:
            if key == (_OWN, _OWN) and before is None:
                raise
            _log.error("A version was refused", extra={"model": name, "version": version, "why": str(error)})
            self._metrics.loads.add((name, version, "refused"))
            if isinstance(error, ManyeyesError):
                self._refused[key] = bundle.stamp
            return before is not None
        self._metrics.loads.add((model.card.name, model.card.version, "loaded"))
        _log.info(
            "A version was loaded",
            extra={"model": model.card.name, "version": model.card.version, "fingerprint": model.card.fingerprint},
        )
        self._loaded[key] = (model, bundle.stamp)
        self._refused.pop(key, None)
        if before is not None:
            await self._swap(set(self._loaded), before[0])
        return True

    async def _swap(self, wanted: set[tuple[str, str]], *replaced: Model) -> None:
        """Serve what is wanted from now on; the rest finishes what it was given, then ends."""
        released = list(replaced) + [self._loaded.pop(key)[0] for key in set(self._loaded) - wanted]
        models: dict[str, dict[str, Model]] = {}
        for model, _ in self._loaded.values():
            models.setdefault(model.card.name, {})[model.card.version] = model
        # A request chooses its model and gives its images to it without a pause of the event loop in between, so none
        # can reach a model after this line that is not served any more.
        self.models = {
            name: {version: versions[version] for version in newest_first(versions)}
            for name, versions in sorted(models.items())
        }
        for model in released:
            _log.info("A version ends", extra={"model": model.card.name, "version": model.card.version})
            await model.close()

    def _wanted(self, found: dict[str, dict[str, FoundBundle]]) -> set[tuple[str, str]]:
        wanted = set()
        for name, versions in found.items():
            served = [version for version in newest_first(versions) if (name, version) in self._loaded]
            named = self.traffic(name).versions()
            wanted |= {(name, version) for version in served[: self._keep_versions]}
            wanted |= {(name, version) for version in served if version in named}
        return wanted

    def _look(self) -> dict[str, dict[str, FoundBundle]]:
        if self._is_bundle is None:
            self._is_bundle = is_bundle(self._uri)
        if self._is_bundle:
            bundle = find_bundle(self._uri)
            # A bundle that is being replaced is away for a moment.
            return {_OWN: {_OWN: bundle}} if bundle else {_OWN: {_OWN: FoundBundle(self._uri, self._stamp_of_own())}}
        try:
            self._settings = read_settings(self._uri).with_traffic(self._overrides)
        except ManyeyesError as error:
            if not self.models:
                raise
            _log.error("The settings were refused, the old ones go on", extra={"why": str(error)})
        return find_bundles(self._uri)

    def _stamp_of_own(self) -> str:
        loaded = self._loaded.get((_OWN, _OWN))
        return loaded[1] if loaded else ""


def _share_of(name: str, request_id: bytes | None) -> float:
    """A number in [0, 1) that depends on nothing but the id, if there is one."""
    if request_id is None:
        return random.random()
    return zlib.crc32(request_id, zlib.crc32(name.encode())) / 2**32


def _unknown(detail: str, status: int = 404) -> Failure:
    return Failure(status, "The request can't be answered", "unknown_model" if status == 404 else "bad_request", detail)

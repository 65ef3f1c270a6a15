"""The models that are served: which version answers a request, and how new versions take the place of old ones."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from manyeyes.errors import BundleError, ManyeyesError, UsageError
from manyeyes.serving.folder import (
    FolderSettings,
    FoundBundle,
    Traffic,
    find_bundle,
    find_bundles,
    is_bundle,
    newest_first,
    read_settings,
    say_why,
    stamp_of_files,
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
        self._settings_error: str | None = None
        # By (name, version) as listed: the model with the stamp it was loaded by, and the stamp it was refused by.
        self._loaded: dict[tuple[str, str], tuple[Model, str]] = {}
        self._refused: dict[tuple[str, str], str] = {}
        self._ending: set[asyncio.Task[None]] = set()
        # What is wrong, as (event, why); told when it comes, not at every look.
        self._told: set[tuple[str, str]] = set()

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
            UsageError: at the first look, where settings from the command line name what is not there.
        """
        found = await asyncio.to_thread(self._look)
        if not self._loaded:
            self._check_overrides(found)
        for name, versions in found.items():
            kept = 0
            for version in newest_first(versions):
                key, bundle = (name, version), versions[version]
                if kept >= self._keep_versions and version not in self.traffic(name).versions():
                    continue
                kept += await self._bring(key, bundle)
        wanted = self._wanted(found)
        gone = {name for name, _ in self._loaded} - {name for name, _ in wanted}
        self._swap(wanted | {key for key in self._loaded if key[0] in gone})
        self._tell(gone)
        if not self.models:
            raise BundleError(
                f"{self._uri} holds no model that can be served. "
                "Give a bundle, or a folder with NAME/VERSION/bundle.json."
            )

    async def close(self, timeout_seconds: float) -> None:
        """Let all models finish; those that have not by then are given up."""
        for model, _ in self._loaded.values():
            self._end(model)
        if self._ending:
            _, left = await asyncio.wait(self._ending, timeout=timeout_seconds)
            for task in left:
                task.cancel()

    async def _bring(self, key: tuple[str, str], bundle: FoundBundle) -> bool:
        """Load a bundle unless that was done or tried; True if this version is served, now or from before."""
        before = self._loaded.get(key)
        if before is not None and before[1] == bundle.stamp:
            return True
        name, version = key
        stamp = None
        try:
            # Before it is read: what changes meanwhile is seen by the next look.
            stamp = await asyncio.to_thread(stamp_of_files, bundle)
            if self._refused.get(key) == stamp:
                return before is not None
            model = await self._load(bundle.uri, name or None, version or None)
        except Exception as error:
            if key == (_OWN, _OWN) and before is None:
                raise
            _log.error("A version was refused", extra={"model": name, "version": version, "why": say_why(error)})
            self._metrics.loads.add((name, version, "refused"))
            # Storage that fails is asked again, a bundle that is no good only when a file of it has changed.
            if stamp is not None and (isinstance(error, ManyeyesError) or not isinstance(error, OSError)):
                self._refused[key] = stamp
            return before is not None
        self._metrics.loads.add((model.card.name, model.card.version, "loaded"))
        _log.info(
            "A version was loaded",
            extra={"model": model.card.name, "version": model.card.version, "fingerprint": model.card.fingerprint},
        )
        self._loaded[key] = (model, bundle.stamp)
        self._refused.pop(key, None)
        if before is not None:
            self._swap(set(self._loaded), before[0])
        return True

    def _swap(self, wanted: set[tuple[str, str]], *replaced: Model) -> None:
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
            self._end(model)

    def _end(self, model: Model) -> None:
        # Beside: what one still has to finish must not hold up the next look.
        task = asyncio.get_running_loop().create_task(model.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _tell(self, gone: Iterable[str]) -> None:
        """Log what is wrong since this look."""
        wrong = {("No version of a model is there any more, what is loaded of it goes on", name) for name in gone}
        if self._settings_error is not None:
            wrong.add(("The settings were refused, the old ones go on", self._settings_error))
        unknown = "The settings name what is not served"
        default = self._settings.default_model
        if default is not None and default not in self.models:
            wrong.add((unknown, f"default_model: there is no model {default}"))
        for name, traffic in self._settings.models.items():
            versions = self.models.get(name)
            if versions is None:
                wrong.add((unknown, f"there is no model {name}, only {', '.join(self.models) or 'none'}"))
                continue
            for version in traffic.versions() - set(versions):
                wrong.add((unknown, f"the model {name} has no version {version}, only {', '.join(versions)}"))
        for event, why in sorted(wrong - self._told):
            _log.warning(event, extra={"why": why})
        self._told = wrong

    def _check_overrides(self, found: dict[str, dict[str, FoundBundle]]) -> None:
        if self._overrides and self._is_bundle:
            raise UsageError(
                f"{self._uri} is one bundle, but --canary and --shadow choose between versions. "
                "Give a folder NAME/VERSION of bundles."
            )
        for name, values in self._overrides.items():
            if name not in found:
                raise UsageError(
                    f"--canary or --shadow names the model {name}, but {self._uri} holds {', '.join(found) or 'none'}."
                )
            for option in ("canary", "shadow"):
                if values.get(option) not in (None, *found[name]):
                    versions = ", ".join(newest_first(found[name])) or "none"
                    raise UsageError(
                        f"--{option} names version {values[option]} of {name}, but {self._uri} holds {versions}."
                    )

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
            self._settings_error = None
        except ManyeyesError as error:
            if not self.models:
                raise
            self._settings_error = str(error)
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

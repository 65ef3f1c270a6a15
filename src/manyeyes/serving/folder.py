"""Where models lie: one bundle, or a folder NAME/VERSION/bundle.json with an optional serving.toml, on any URI.

Names come from the listing of the folder, never from a request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from manyeyes import config, storage
from manyeyes.errors import BundleError, ConfigError, ManyeyesError
from manyeyes.recognition.bundle import INFO_NAME, Bundle

SETTINGS_NAME = "serving.toml"
# What may stand in a URL and a log without being quoted.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class FoundBundle:
    """A bundle that lies somewhere; `stamp` is that of its bundle.json, which has the checksums of all other files."""

    uri: str
    stamp: str


@dataclass(frozen=True)
class Traffic:
    """Which versions of a model answer.

    Attributes:
        default: answers what the canary does not; default: the newest that is no canary and no shadow.
        canary: answers `canary_weight` of the requests, a number in [0, 1].
        shadow: answers every request too; its answer is only compared and counted.
    """

    default: str | None = None
    canary: str | None = None
    canary_weight: float = 0.0
    shadow: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.canary_weight <= 1:
            raise ConfigError(f"canary_weight={self.canary_weight} is not in [0, 1].")

    def versions(self) -> set[str]:
        """All that are named."""
        return {version for version in (self.default, self.canary, self.shadow) if version is not None}


@dataclass(frozen=True)
class FolderSettings:
    """The content of serving.toml.

    Attributes:
        default_model: answers requests that name none.
        models: traffic by name of the model.
    """

    default_model: str | None = None
    models: dict[str, Traffic] = field(default_factory=dict)

    def with_traffic(self, overrides: Mapping[str, Mapping[str, object]]) -> FolderSettings:
        """A copy with some settings of some models replaced (from the command line)."""
        models = dict(self.models)
        for name, values in overrides.items():
            models[name] = dataclasses.replace(models.get(name, Traffic()), **values)  # type: ignore[arg-type]
        return FolderSettings(self.default_model, models)


def is_bundle(uri: str) -> bool:
    """Whether `uri` is a bundle itself, rather than a folder of models."""
    return storage.exists(storage.join(uri, INFO_NAME))


def find_bundles(uri: str) -> dict[str, dict[str, FoundBundle]]:
    """List what lies in a folder of models: bundles by version by name.

    What has no bundle.json (yet) is passed over, and so are names that could not stand in a URL.

    Raises:
        BundleError: there is no such folder.
        OSError: the storage fails.
    """
    try:
        return {
            name: {
                version: found
                for version in _directories(storage.join(uri, name))
                if (found := find_bundle(storage.join(uri, name, version))) is not None
            }
            for name in _directories(uri)
        }
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"There is no bundle at {uri}, and no folder with NAME/VERSION/{INFO_NAME}. "
            f"Make one with: manyeyes export RUN {uri}"
        ) from None


def find_bundle(uri: str) -> FoundBundle | None:
    """The bundle at `uri`, if one is there."""
    try:
        content = storage.read_bytes(storage.join(uri, INFO_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FoundBundle(uri, hashlib.sha256(content).hexdigest()[:16])


def stamp_of_files(bundle: FoundBundle) -> str:
    """Return what changes when a file of a bundle does, be it complete or not: names, sizes and times."""
    filesystem, path = storage.filesystem(bundle.uri)
    files = sorted(
        (entry["name"], entry["size"] or 0, str(entry.get("mtime") or entry.get("LastModified")))
        for entry in filesystem.ls(path, detail=True)
    )
    return f"{bundle.stamp} {hashlib.sha256(repr(files).encode()).hexdigest()}"


def read_bundle(uri: str) -> dict[str, bytes]:
    """Read all files of the bundle at `uri`, by name.

    Raises:
        BundleError: it is damaged.
        OSError: the storage fails.
    """
    bundle = Bundle.load(uri)
    return {
        INFO_NAME: storage.read_bytes(storage.join(uri, INFO_NAME)),
        **{name: bundle.read_file(name) for name in bundle.info.files},
    }


def say_why(error: Exception) -> str:
    """Why a bundle can't be loaded; what nobody foresaw is told with its kind."""
    return str(error) if isinstance(error, (ManyeyesError, OSError)) else f"{type(error).__name__}: {error}"


def read_settings(uri: str) -> FolderSettings:
    """Read serving.toml of a folder of models; the defaults if there is none.

    Raises:
        ConfigError: it can't be understood.
    """
    where = storage.join(uri, SETTINGS_NAME)
    try:
        values = tomllib.loads(storage.read_bytes(where).decode())
    except (FileNotFoundError, NotADirectoryError):
        return FolderSettings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not a valid TOML file: {error}") from None
    models = values.pop("models", {})
    if not isinstance(models, dict):
        raise ConfigError(f"{where}: models must be sections like [models.NAME].")
    settings = config.from_dict(FolderSettings, values, where)
    return dataclasses.replace(
        settings, models={name: config.from_dict(Traffic, each, f"models.{name}") for name, each in models.items()}
    )


def newest_first(versions: Iterable[str]) -> list[str]:
    """Sort versions: numbers within them count as numbers, so that 10 is newer than 9."""
    return sorted(
        versions,
        key=lambda text: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", text)
        ],
        reverse=True,
    )


def _directories(uri: str) -> list[str]:
    return [item.name for item in storage.iterate_directory(uri) if item.is_directory and _NAME.fullmatch(item.name)]

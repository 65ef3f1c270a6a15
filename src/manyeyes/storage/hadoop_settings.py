"""Hadoop's own settings (core-site.xml, hdfs-site.xml): which NameNodes an address stands for."""

from __future__ import annotations

import contextlib
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from manyeyes.errors import UsageError
from manyeyes.storage.remote import first_that_answers, split_host_port

# What HDFS itself needs to know.
_FILES = ("core-site.xml", "hdfs-site.xml")
# Where Hadoop looks for a NameNode whose port is not said.
DEFAULT_PORT = 8020


def name_service(authority: str, settings: dict[str, str], uri: str) -> tuple[str, dict[str, str]]:
    """Return what to call the NameNode or name service, and the settings by which the client finds its NameNodes."""
    ids = [name for name in re.split(r"[,\s]+", settings.get(f"dfs.ha.namenodes.{authority}", "")) if name]
    addresses = {name: settings.get(f"dfs.namenode.rpc-address.{authority}.{name}", "") for name in ids}
    if ids:
        if missing := [name for name, address in addresses.items() if not address]:
            raise UsageError(
                f"Hadoop's settings name the NameNode {missing[0]!r} of {uri} but no "
                f"dfs.namenode.rpc-address.{authority}.{missing[0]}. Add it to hdfs-site.xml."
            )
        pairs = {name: split_host_port(address, DEFAULT_PORT, uri) for name, address in addresses.items()}
        alive = first_that_answers(list(pairs.values()), f"{uri} can't be opened: no NameNode answers")
        # The client waits long for one that is off the network: it comes last.
        ids.sort(key=lambda name: pairs[name] != alive)
        found = {f"dfs.namenode.rpc-address.{authority}.{name}": f"{pair[0]}:{pair[1]}" for name, pair in pairs.items()}
        found[f"dfs.ha.namenodes.{authority}"] = ",".join(ids)
        return authority, found
    single = settings.get(f"dfs.namenode.rpc-address.{authority}", authority)
    host, port = split_host_port(single, DEFAULT_PORT, uri)
    first_that_answers([(host, port)], f"{uri} can't be opened: no NameNode answers")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", {}


def settings_directory() -> str:
    """Return the folder of Hadoop's settings as HADOOP_CONF_DIR or HADOOP_HOME say, or an empty text."""
    if directory := os.environ.get("HADOOP_CONF_DIR"):
        return directory
    home = os.environ.get("HADOOP_HOME")
    return f"{home}/etc/hadoop" if home else ""


def settings_version(directory: str) -> tuple[int, ...]:
    """Changes when a file of settings is written anew."""
    found = []
    for name in _FILES if directory else ():
        with contextlib.suppress(OSError):
            found.append(Path(directory, name).stat().st_mtime_ns)
    return tuple(found)


def read_settings(directory: str, files: Sequence[str] = _FILES) -> dict[str, str]:
    """Return the properties in those `files` of `directory` that are there, trimmed, with ${names} filled in.

    Raises:
        UsageError: a file is not XML, or can't be read.
    """
    settings: dict[str, str] = {}
    for name in files if directory else ():
        path = Path(directory, name)
        if not path.exists():
            continue
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError) as error:
            raise UsageError(f"Hadoop's settings in {path} can't be read: {error}. Mend HADOOP_CONF_DIR.") from None
        for found in root.iter("property"):
            key, value = (found.findtext("name") or "").strip(), (found.findtext("value") or "").strip()
            if key and value:
                settings[key] = value
    return {
        key: re.sub(r"\$\{([^}]+)\}", lambda found: settings.get(found[1], found[0]), value)
        for key, value in settings.items()
    }

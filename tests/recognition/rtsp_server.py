"""Serve pipelines of GStreamer over RTSP: python rtsp_server.py PORT PATH PIPELINE [PATH PIPELINE …]; prints its port.

By ctypes, as GStreamer's own bindings are of Debian's Python only.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TEXT, _POINTER, _INT = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def main() -> None:
    glib, gst, rtsp = map(ctypes.CDLL, ("libglib-2.0.so.0", "libgstreamer-1.0.so.0", "libgstrtspserver-1.0.so.0"))
    _function(gst, "gst_init", None, _POINTER, _POINTER)(None, None)
    server = _function(rtsp, "gst_rtsp_server_new", _POINTER)()
    _function(rtsp, "gst_rtsp_server_set_address", None, _POINTER, _TEXT)(server, b"127.0.0.1")
    _function(rtsp, "gst_rtsp_server_set_service", None, _POINTER, _TEXT)(server, sys.argv[1].encode())
    mounts = _function(rtsp, "gst_rtsp_server_get_mount_points", _POINTER, _POINTER)(server)
    new_factory = _function(rtsp, "gst_rtsp_media_factory_new", _POINTER)
    set_launch = _function(rtsp, "gst_rtsp_media_factory_set_launch", None, _POINTER, _TEXT)
    add_factory = _function(rtsp, "gst_rtsp_mount_points_add_factory", None, _POINTER, _TEXT, _POINTER)
    for path, pipeline in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        factory = new_factory()
        set_launch(factory, pipeline.encode())
        add_factory(mounts, path.encode(), factory)
    if not _function(rtsp, "gst_rtsp_server_attach", ctypes.c_uint, _POINTER, _POINTER)(server, None):
        sys.exit(f"Port {sys.argv[1]} can't be had.")
    print(_function(rtsp, "gst_rtsp_server_get_bound_port", _INT, _POINTER)(server), flush=True)
    loop = _function(glib, "g_main_loop_new", _POINTER, _POINTER, _INT)(None, 0)
    _function(glib, "g_main_loop_run", None, _POINTER)(loop)


if __name__ == "__main__":
    main()

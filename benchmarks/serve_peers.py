"""The peers that benchmarks/serve.py measures: the same `Predictor` behind LitServe, BentoML, Ray Serve and mosec.

Each is set up as its documentation begins: one process for the model, and its own batching off or on (32 images, 10 ms,
which is the wait that mosec and Ray Serve come with). The image travels as the peer likes it: raw where it can take raw
bytes (Ray Serve, mosec), else as base64 in JSON (LitServe, BentoML). The peers live in a virtual environment of their
own, with the Python version of the project's; what `Predictor` needs is taken from the project's environment, behind
their own packages. Started by serve.py with PEER and more in the environment; alone it only says which peers it knows.
"""

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

BATCH = 32
WAIT_MS = 10
# Name of the package -> path of its URL.
PEERS = {"litserve": "/predict", "bentoml": "/recognise", "ray": "/", "mosec": "/inference"}
PEER = os.environ.get("PEER", "")
BATCHING = os.environ.get("PEER_BATCHING") == "1"
PORT = int(os.environ.get("PEER_PORT", "0"))


def body_and_type(peer: str, image: bytes) -> tuple[bytes, str]:
    """The body of a request and its Content-Type."""
    text = base64.b64encode(image).decode()
    if peer == "litserve":
        return json.dumps({"image": text}).encode(), "application/json"
    if peer == "bentoml":
        return json.dumps({"images": [text]}).encode(), "application/json"
    return image, "application/octet-stream"


def command(peer: str, python: str, port: int) -> list[str]:
    """How it is started."""
    if peer == "bentoml":
        where = ["--working-dir", str(Path(__file__).resolve().parent), "--host", "127.0.0.1", "--port", str(port)]
        return [python, "-m", "bentoml", "serve", "serve_peers:Recogniser", *where]
    arguments = ["--address", "127.0.0.1", "--port", str(port)] if peer == "mosec" else []
    return [python, str(Path(__file__).resolve()), *arguments]


def environment(peer: str, bundle: str, backend: str, port: int, batching: bool) -> dict[str, str]:
    """What it is told; called in the project's environment."""
    import numpy

    import manyeyes

    packages = [str(Path(module.__file__).parents[1]) for module in (manyeyes, numpy)]
    return {
        "PEER": peer,
        "PEER_BATCHING": str(int(batching)),
        "PEER_PORT": str(port),
        "PEER_BUNDLE": bundle,
        "PEER_BACKEND": backend,
        "PEER_PACKAGES": os.pathsep.join(dict.fromkeys(packages)),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(Path(tempfile.gettempdir()) / "manyeyes-bench-bentoml"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def load():
    """The predictor, with one thread."""
    sys.path += [path for path in os.environ["PEER_PACKAGES"].split(os.pathsep) if path not in sys.path]
    import cv2

    from manyeyes.recognition.predictor import Predictor

    cv2.setNumThreads(1)
    predictor = Predictor.load(os.environ["PEER_BUNDLE"], os.environ["PEER_BACKEND"], num_threads=1)
    predictor.warm_up((1, BATCH))
    return predictor


def answers(predictor, images: list[bytes]) -> list[dict]:
    """What goes back for each image: the five likeliest classes."""
    return [
        {"predictions": [{"class_name": one.class_name, "probability": one.probability} for one in found.top_k]}
        for found in predictor.predict(images)
    ]


if PEER == "litserve":
    import litserve

    class Recogniser(litserve.LitAPI):
        def setup(self, device):
            self.predictor = load()

        def decode_request(self, request):
            return base64.b64decode(request["image"])

        def batch(self, inputs):
            return inputs

        def predict(self, images):
            return answers(self.predictor, images) if BATCHING else answers(self.predictor, [images])[0]

        def unbatch(self, output):
            return output

        def encode_response(self, output):
            return output

    if __name__ == "__main__":
        api = Recogniser(max_batch_size=BATCH, batch_timeout=WAIT_MS / 1000) if BATCHING else Recogniser()
        server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
        server.run(host="127.0.0.1", port=PORT, num_api_servers=1, log_level="warning", generate_client_file=False)

elif PEER == "bentoml":
    import bentoml

    @bentoml.service(workers=1)
    class Recogniser:
        def __init__(self) -> None:
            self.predictor = load()

        # Its waiting time adapts itself; max_latency_ms, beyond which it gives up, stays as it comes.
        @bentoml.api(batchable=BATCHING, **({"max_batch_size": BATCH} if BATCHING else {}))
        def recognise(self, images: list[str]) -> list[dict]:
            return answers(self.predictor, [base64.b64decode(image) for image in images])

elif PEER == "ray":
    import signal
    import time

    import ray
    from ray import serve

    # Five at once, as it comes, would never fill a batch.
    @serve.deployment(max_ongoing_requests=4 * BATCH)
    class Recogniser:
        def __init__(self):
            self.predictor = load()

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_MS / 1000)
        async def recognise(self, images):
            return answers(self.predictor, images)

        async def __call__(self, request):
            image = await request.body()
            # By the environment, because this class is sent to its process by value.
            if os.environ["PEER_BATCHING"] == "1":
                return await self.recognise(image)
            return answers(self.predictor, [image])[0]

    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(Recogniser.bind())
        while True:
            time.sleep(1)

elif PEER == "mosec":
    import mosec

    class Recogniser(mosec.Worker):
        def __init__(self):
            super().__init__()
            self.predictor = load()

        def deserialize(self, data):
            return data

        def forward(self, data):
            return answers(self.predictor, data) if BATCHING else answers(self.predictor, [data])[0]

    if __name__ == "__main__":
        server = mosec.Server()
        server.append_worker(Recogniser, max_batch_size=BATCH if BATCHING else 1, max_wait_time=WAIT_MS)
        server.run()

elif __name__ == "__main__":
    print(f"benchmarks/serve.py --peers-python PYTHON measures those of these that PYTHON has: {', '.join(PEERS)}")

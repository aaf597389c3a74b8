"""An application of Ray Serve that takes the binary tensors of the Open Inference Protocol:
python ray_app.py MODEL.ONNX NAME THREADS PORT."""

import json
import sys
import time

import numpy as np
import onnxruntime as ort
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

DTYPES = {"INT64": np.int64, "FP32": np.float32}
LENGTH = "inference-header-content-length"


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Onnx:
    def __init__(self, file: str, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(file, options)
        self.outputs = [one.name for one in self.session.get_outputs()]

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"ready": True})
        body, start = await request.body(), int(request.headers[LENGTH])
        asked, feeds = json.loads(body[:start]), {}
        for one in asked["inputs"]:
            size = one["parameters"]["binary_data_size"]
            array = np.frombuffer(body[start : start + size], DTYPES[one["datatype"]])
            feeds[one["name"]] = array.reshape(one["shape"])
            start += size
        found = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        described = [
            {"name": name, "datatype": "FP32", "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
            for name, array in found.items()
        ]
        head = json.dumps({"outputs": described}).encode()
        content = head + b"".join(array.tobytes() for array in found.values())
        return Response(content, headers={LENGTH: str(len(head))})


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[4])})
    serve.run(Onnx.bind(sys.argv[1], int(sys.argv[3])), route_prefix=f"/v2/models/{sys.argv[2]}")
    while True:
        time.sleep(1)

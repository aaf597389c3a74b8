"""A model of KServe's Python server: python kserve_app.py MODEL.ONNX NAME THREADS PORT."""

import sys

import kserve
import onnxruntime as ort


class Onnx(kserve.Model):
    def __init__(self, file: str, name: str, threads: int) -> None:
        super().__init__(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(file, options)
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.ready = True

    def predict(self, payload: kserve.InferRequest, headers=None, response_headers=None) -> kserve.InferResponse:
        feeds = {one.name: one.as_numpy() for one in payload.inputs}
        found = []
        for name, array in zip(self.outputs, self.session.run(self.outputs, feeds), strict=True):
            found.append(kserve.InferOutput(name, list(array.shape), "FP32"))
            found[-1].set_data_from_numpy(array, binary_data=True)
        return kserve.InferResponse(payload.id or "", self.name, found)


if __name__ == "__main__":
    model = Onnx(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    kserve.ModelServer(http_port=int(sys.argv[4]), enable_grpc=False, workers=1).start([model])

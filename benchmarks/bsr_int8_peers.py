"""Dense int8 products of ONNX Runtime and OpenVINO, for bench_bsr_int8.py; runs where these two are installed.

    python bsr_int8_peers.py SECONDS THREADS M K N [M K N ...]

prints a JSON line for every shape, microseconds a call: `ort integer` (MatMulInteger, uint8 by int8 to int32, nothing
after it), `ort qlinear` (QLinearMatMul, uint8 to uint8, a scale per output, no bias) and `openvino` (float32 to
float32, quantised on the way, with scales and bias). One thread: medians of this process's CPU time; more: 5th
percentiles of wall time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

RANDOM = np.random.default_rng(0)


def clock(run: Callable[[], object], seconds: float, threads: int) -> float:
    now = time.process_time_ns if threads == 1 else time.perf_counter_ns
    for _ in range(3):
        run()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < stop:
        start = now()
        run()
        times.append((now() - start) / 1e3)
    return statistics.median(times) if threads == 1 else statistics.quantiles(times, n=20)[0]


def operands(m: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    return RANDOM.integers(0, 255, (n, k), dtype=np.uint8), RANDOM.integers(-100, 100, (k, m), dtype=np.int8)


def ort(m: int, k: int, n: int, threads: int, qlinear: bool) -> Callable[[], object]:
    x, weight = operands(m, k, n)
    held = {"weight": weight, "x_zero": np.uint8(128), "weight_zero": np.zeros(m, np.int8)}
    inputs, kind = ["x", "weight", "x_zero", "weight_zero"], TensorProto.INT32
    if qlinear:
        held |= {"x_scale": np.float32(0.02), "weight_scale": np.full(m, 0.01, np.float32)}
        held |= {"y_scale": np.float32(0.5), "y_zero": np.uint8(128)}
        inputs = ["x", "x_scale", "x_zero", "weight", "weight_scale", "weight_zero", "y_scale", "y_zero"]
        kind = TensorProto.UINT8
    node = helper.make_node("QLinearMatMul" if qlinear else "MatMulInteger", inputs, ["y"])
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.UINT8, [n, k])],
        [helper.make_tensor_value_info("y", kind, [n, m])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in held.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    y = np.empty((n, m), np.uint8 if qlinear else np.int32)
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
    return lambda: session.run_with_iobinding(binding)


def open_vino(m: int, k: int, n: int, threads: int) -> Callable[[], object]:
    x, weight = operands(m, k, n)
    source = ops.parameter([n, k], np.float32)
    low, high = np.float32(-2.56), np.float32(2.54)
    floats = ops.fake_quantize(source, low, high, low, high, 256)  # what makes it an int8 model for OpenVINO
    scales = np.full((m, 1), 0.01, np.float32)
    stored = ops.multiply(ops.convert(ops.constant(weight.T.copy()), "f32"), ops.constant(scales))
    product = ops.add(ops.matmul(floats, stored, False, True), ops.constant(np.ones((1, m), np.float32)))
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(openvino.Model([product], [source]), "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor((x.astype(np.float32) - 128) * np.float32(0.02)))
    return request.infer


def main() -> None:
    seconds, threads = float(sys.argv[1]), int(sys.argv[2])
    for i in range(3, len(sys.argv) - 2, 3):
        m, k, n = (int(v) for v in sys.argv[i : i + 3])
        calls = {"ort integer": ort(m, k, n, threads, False), "ort qlinear": ort(m, k, n, threads, True)}
        calls["openvino"] = open_vino(m, k, n, threads)
        times = {name: round(clock(call, seconds, threads), 2) for name, call in calls.items()}
        print(json.dumps({"m": m, "k": k, "n": n} | times), flush=True)


if __name__ == "__main__":
    main()

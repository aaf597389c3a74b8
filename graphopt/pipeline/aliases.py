"""What users call passes, options, values and targets elsewhere: by that name, what to write here.

Only what means the same stands here. A name that means something else than any of ours (lora) has no entry, for a wrong
suggestion is worse than a list. Names are compared as `errors.plain_name` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS_4 = "quantize{scheme=weight-only bits=4}"
_PAIRS = "sparsify{pattern=2:4}"

PASSES: Mapping[str, str] = {
    **dict.fromkeys(("int8", "i8", "uint8", "w8a8", "quant", "quantization", "quantisation", "ptq"), "quantize"),
    **dict.fromkeys(("static", "staticint8", "quantizestatic", "staticquantization"), "quantize{scheme=static}"),
    **dict.fromkeys(("dynamic", "dynamicint8", "quantizedynamic", "dynamicquantization"), "quantize{scheme=dynamic}"),
    **dict.fromkeys(("weightonly", "w8", "w8a16", "woq"), "quantize{scheme=weight-only}"),
    **dict.fromkeys(("int4", "i4", "uint4", "4bit", "w4", "w4a16"), _WEIGHTS_4),
    **dict.fromkeys(("int2", "2bit", "w2"), "quantize{scheme=weight-only bits=2}"),
    "gptq": "quantize{rounding=gptq}",
    **dict.fromkeys(("fp8", "float8", "e4m3"), "quantize{dtype=float8}"),
    "qat": "quantize,finetune",
    **dict.fromkeys(("fp16", "f16", "half", "float16"), "cast"),
    **dict.fromkeys(("bf16", "bfloat16"), "cast{dtype=bfloat16}"),
    **dict.fromkeys(("smoothquant", "equalize", "equalization", "cle"), "smooth"),
    **dict.fromkeys(("pruning", "structured", "structuredpruning", "channelpruning", "headpruning"), "prune"),
    **dict.fromkeys(("magnitude", "magnitudepruning", "unstructured", "sparse", "sparsity"), "sparsify"),
    **dict.fromkeys(("2:4", "24", "semistructured", "nm", "n:m"), _PAIRS),
    "wanda": "sparsify{criterion=wanda}",
    "sparsegpt": "sparsify{criterion=sparsegpt}",
    **dict.fromkeys(("svd", "factorize", "factorization", "decompose", "decomposition", "asvd"), "low-rank"),
    **dict.fromkeys(("distillation", "kd", "knowledgedistillation"), "distill"),
    **dict.fromkeys(("train", "training", "retrain", "finetuning"), "finetune"),
    **dict.fromkeys(("fuse", "fusion", "fold", "foldconstants", "constantfolding", "onnxsim", "onnxslim"), "simplify"),
    **dict.fromkeys(("gelu", "fastgelu", "tanhgelu"), "approximate"),
    **dict.fromkeys(("lossless", "o1"), "safe"),
}
"""By name, the text of a pass."""

TARGETS: Mapping[str, str] = {
    **dict.fromkeys(("ort", "onnx", "onnxrt", "ortcpu", "onnxruntimecpu", "cpu"), "onnxruntime"),
    **dict.fromkeys(("ortcuda", "ortgpu", "onnxruntimegpu", "onnxcuda", "onnxgpu"), "onnxruntime-cuda"),
    **dict.fromkeys(("trt", "nvinfer"), "tensorrt"),
    **dict.fromkeys(("ov", "openvinocpu"), "openvino"),
    **dict.fromkeys(("torch", "pytorch", "pt", "pytorchcpu", "eager"), "torch-cpu"),
    **dict.fromkeys(("gpu", "nvidia", "torchcuda", "pytorchcuda"), "cuda"),
    **dict.fromkeys(("mkldnn", "dnnl", "x86"), "onednn"),
}

OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(("sparsity", "ratio", "fraction", "share"), "amount"),
    **dict.fromkeys(("mode", "method", "approach"), "scheme"),
    **dict.fromkeys(("weightbits", "wbits", "nbits", "numbits", "bit"), "bits"),
    **dict.fromkeys(("actbits", "abits", "activationbit"), "activation_bits"),
    **dict.fromkeys(("groupsize", "blocksize", "group"), "block"),
    **dict.fromkeys(("calibrator", "calibrationmethod", "calibratemethod"), "observer"),
    **dict.fromkeys(("exclude", "skip", "except", "nodestoexclude"), "ignore"),
    **dict.fromkeys(("include", "only", "layers", "modules", "sites", "nodes"), "targets"),
    "sym": "symmetric",
    **dict.fromkeys(("smoothquant", "equalize"), "smooth"),
    **dict.fromkeys(("type", "precision", "datatype"), "dtype"),
    **dict.fromkeys(("importance", "score", "metric", "norm"), "criterion"),
    **dict.fromkeys(("nm", "structure"), "pattern"),
    "r": "rank",
    **dict.fromkeys(("learningrate", "stepsize"), "lr"),
    "wd": "weight_decay",
    "optim": "optimizer",
    **dict.fromkeys(("numepochs", "maxepochs", "epoch"), "epochs"),
    **dict.fromkeys(("maxsteps", "numsteps", "iterations", "iters"), "steps"),
    **dict.fromkeys(("gradientaccumulation", "gradaccum", "accumulation"), "accumulate"),
    **dict.fromkeys(("gradclip", "maxgradnorm", "clipnorm"), "clip"),
    **dict.fromkeys(("t", "temp"), "temperature"),
}
"""Of options of any pass; it counts where the pass has the option that is meant."""

VALUES: Mapping[str, str] = {
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp8", "e4m3", "f8"), "float8"),
    **dict.fromkeys(("i8", "qint8", "uint8"), "int8"),
    **dict.fromkeys(("w8a16", "w4a16", "woq"), "weight-only"),
    **dict.fromkeys(("round", "rtn"), "nearest"),
    **dict.fromkeys(("max", "absmax"), "minmax"),
    **dict.fromkeys(("kl", "kldivergence"), "entropy"),
    **dict.fromkeys(("l2norm", "frobenius"), "l2"),
    "l1norm": "l1",
    "local": "layer",
}
"""Of options that take one of several words; it counts where the option takes what is meant."""

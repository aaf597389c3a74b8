"""What every side must know of quantize and dequantize: numbers in integers, and the forms that kernels take."""

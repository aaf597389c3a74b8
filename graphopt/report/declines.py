"""Where a decline becomes a sentence: one text for each code, filled with the decline's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from graphopt.ir.decline import Decline

SENTENCES = {
    # every pass
    "told": "{sentence}",
    "slower": "slower when changed: {after:.0f} us in place of {before:.0f} us",
    "nothing_to_change": "nothing to change",
    "op_without_form": "this pass has no form for the weights of {op}",
    "in_body": "{op} stands in a branch or in the body of a loop, which this pass does not enter: its weights stay as "
               "they are",
    "not_calibrated_in_body": "{op} stands in a branch or in the body of a loop, whose values no calibration sees: "
                              "scheme=dynamic and scheme=weight-only need none",
    "opaque_operator": "{op} is an operator that no pass knows: its weights stay as they are",
    # groups (analysis)
    "axis_of_directions": "it is the axis of the directions of {op} ({node})",
    "axis_of_input": "it is the model's input '{input}'",
    "axis_of_output": "it is the model's output '{output}'",
    "axis_of_one_unit": "it has a single unit",
    "axis_of_space": "it is a space axis of {op} ({node})",
    "axis_of_attention_mask": "it is a length of the mask of {op} ({node})",
    "axis_inside_attention": "it is a length or the size of a head of {op} ({node})",
    "axis_inside_a_group": "it is inside a group of {op} ({node})",
    "axis_joined_to_unknown_size": "it is joined to an axis of unknown size by {op} ({node})",
    "axis_looked_up": "it is indexed by {op} ({node})",
    "axis_meets_another_size": "it meets an axis of another size, or of an unknown one, at {op} ({node})",
    "axis_mixed": "it is mixed by {op} ({node})",
    "axis_normalized": "it is normalized by {op} ({node})",
    "axis_padded": "it is padded by {op} ({node})",
    "axis_picked_by_index": "{op} picks an entry of it by index ({node})",
    "axis_read_in_subgraph": "it is read inside {op} ({node})",
    "axis_read_whole": "it is read whole by {op} ({node})",
    "axis_repeated": "it is repeated by {op} ({node})",
    "axis_rolled": "it is rolled by {op} ({node})",
    "axis_split_or_merged": "it is split or merged by {op} ({node})",
    "axis_stacked": "it is the axis that {op} stacks along ({node})",
    "axis_summed_up": "{op} computes running sums along it ({node})",
    "axis_taken_apart": "it is split into single entries by {op} ({node})",
    "axis_taken_in_part": "it is the sliced axis of {op} ({node})",
    "axis_taken_in_steps": "it is taken in steps by {op} ({node})",
    "axis_at_a_fixed_op": "it reaches {op} ({node}), whose axes cannot shrink",
    "axis_at_unknown_operation": "it reaches {op} ({node}), which is not known",
    "axis_in_blocks": "it reaches {op} ({node}), which has one scale per block",
    "axis_in_product_of_vector": "it reaches {op} ({node}), one of whose operands is a vector",
    "axis_in_sequence": "it reaches {op} ({node}), whose sequence is not read part by part",
    "axis_in_unknown_form": "it reaches {op} ({node}), in a form that is not known",
    "axis_of_a_view": "it reaches {op} ({node}), which reads a view of another value",
    "axis_of_groups": "it reaches {op} ({node}), a transposed conv in groups",
    "axis_of_unknown_channels": "it reaches {op} ({node}), where the number of channels is not known",
    "axis_of_unknown_heads": "it reaches {op} ({node}), where the number of heads is not known",
    "axis_of_unknown_rank": "it reaches {op} ({node}), where the rank of '{value}' is not known",
    "axis_of_unknown_size": "it reaches {op} ({node}), where the size of an axis is not known",
    "axis_padded_by_computed_amount": "it reaches {op} ({node}), which pads by an amount that the model computes",
    "axis_that_is_computed": "it reaches {op} ({node}), along an axis that the model computes",
    "axis_with_computed_bounds": "it reaches {op} ({node}), whose bounds the model computes",
    # weights (pipeline/weights.py)
    "no_weight": "{op} has no weight",
    "not_linear_or_conv": "{op} is neither linear nor conv",
    "already_quantized": "already quantized",
    "weight_computed": "weight is computed by the graph",
    "weight_not_float": "weight is {dtype}, not float",
    "weight_tied": "weight is tied with {reader}",
    # prune
    "no_group": "in no group of {kinds}",
    "in_no_branch": "in no residual branch",
    "branch_read_elsewhere": "what {site} in it computes is read outside of it too",
    "branch_not_pure": "{op} in it is random, or has effects",
    "shortcut_differs": "the shape of its sum is {result}, and that of its shortcut {shortcut}",
    "shortcut_not_identity": "its shortcut is computed too, by {site}",
    "shortcut_returned": "without it the graph would return an input, or one value twice",
    "branch_matters_more": "kept: were it removed in place of {site}, the outputs would be at {sqnr:.1f} dB",
    "no_branch_goes": "all {count} layers are kept",
    "no_units_go": "all of its {size} {kind} are kept",
    "not_weighed_unread": "criterion={criterion} cannot score it: no linear or conv with a stored float weight reads "
    "it; use criterion=l2",
    "not_weighed_without_weight": "criterion={criterion} cannot score it: it has no stored float weight",
    "not_weighed_by_zeros": "criterion={criterion} cannot score it: a norm, a product of two computed values or no "
    "stored float weight reads it, and zeros in weights do not stand for its units; use criterion=l2",
    # sparsify
    "no_amount": "no term of amount matches it",
    "amounts_differ": "the sites that share it have different amounts: {amounts}",
    "not_divided": "{size} along the {axis} axis is no multiple of {multiple}",
    "nothing_to_zero": "the amount is {count} of {total} weights",
    "zero_already": "the amount is {count} of {total} weights, and so many are zero already",
    # low-rank
    "half_of_pair": "already half of a low-rank pair",
    "grouped_conv": "a conv of {groups} groups: each kernel reads {channels} of its channels",
    "kernel_of_one_axis": "a kernel {kernel} has no two axes to split; conv=channel splits it",
    "pair_not_smaller": "rank {rank} holds {pair} numbers, no fewer than the {whole} of {shape}",
    "pair_not_cheaper": "rank {rank} takes {factor:.2f} times the multiply-adds of {shape}",
    "worth_its_cost": "kept whole: a rank-{rank} split of {shape} has error {error:.2g}, too much for the {budget} "
    "that it saves",
    "no_rank_faster": "no rank of {shape} (x{count}) is faster: {speedups}",
    # quantize, smooth
    "no_integer_form": "{op} has no int8 form of its own",
    "matmul_side_stored": "matmul is quantized only between two activations, and one side is stored",
    "not_float32": "{name} is {dtype}, not float32",
    "table_quantized": "its table is quantized already",
    "table_computed": "its table is computed by the graph",
    "table_tied": "its table is tied with linear {site}, which stays float",
    "no_kernel": "{target} has no fast {scheme} {op}",
    "no_kernel_uncalibrated": "{target} has no fast {scheme} {op}; static needs calibration",
    "dtype_weight_only": "{dtype} is for products of two sides: give scheme=static, dynamic or auto",
    "bits_unsupported": "a {scheme} {op} has weights of {known} bits here, not {bits}",
    "granularity_unsupported": "{target} has kernels for dynamic activations of granularity {known}, not {asked}",
    "rows_not_in_blocks": "QuantizeLinear has blocks from opset 21 on, of rows of a known width; this is opset {opset}",
    "rows_of_linears": "activations have a scale for each row where a linear reads them: {op} has no such kernel",
    "activation_bits_static": "activations of {bits} bits are int8 of a range that is known: give calibration, and "
    "scheme=static or auto",
    "activation_bits_unread": "{target} reads quantize and dequantize of 8 bits alone, not of {bits}",
    "block_not_dividing": "block {block} does not divide {inputs} inputs",
    "no_term_matches": "no term of {option} matches it",
    "kept_for_goal": "kept in higher precision for {goal}: quantized alone, it leaves the worst output {sqnr:.1f} dB",
    "ignored": "selected by ignore",
    "frozen": "selected by freeze: its parameters stay",
    "no_static_kernel": "the target has no fast static kernel for it",
    "input_in_float": "{value}, which it reads, stays float",
    "side_in_float": "one side stays float: {value}",
    "side_stored": "one side is stored: {value}",
    "read_in_float": "its result is read in float",
    "mean_not_global": "a mean has an int8 form only over all spatial axes",
    "padding_not_zero": "it pads with a value other than 0",
    "no_weight_to_scale": "{op} has no weight to absorb factors",
    "smoothing_no_gain": "no smoothing factors lower the estimated int8 error",
    "input_returned": "the graph returns its input",
    "input_shared": "{op} {site} reads its input too",
    "conv_grouped": "it is a conv in groups of several channels",
    "weight_shared": "its weight is tied with {op} {site}",
    "input_cannot_absorb": "an input of the model cannot absorb factors",
    "cannot_absorb": "{op} {site} cannot absorb factors",
    "mul_cannot_absorb": "neither side of mul {site} can absorb factors",
    "read_before": "other nodes too read the input of {op} {site}",
    "norm_over_several_axes": "{op} {site} is over several axes",
    "parameters_not_own": "the weight or bias of {op} {site} is not a stored one of its own",
    # cast, approximate, simplify
    "beyond_dtype": "max_abs of its {value} is {max_abs:.3g}, above the maximum of {dtype} ({largest:.3g})",
    "vanishes_in_dtype": "{dtype} rounds its constant {number:.3g} to 0",
    "reads_unfit": "it reads what comes of a constant that {dtype} does not hold",
    "float_mask": "its mask is float, and the number in place of minus infinity may exceed float16",
    "no_approximation": "there is no approximation of {op}",
    "already_approximate": "it is approximated by {form} already",
    "norm_not_on_outputs": "the norm's axis 1 is not the axis of the linear's outputs",
    "weight_read_twice": "another node reads the weight too",
    "pair_computed": "a weight of the pair is computed by the graph",
    # merge-linear, fold-int8
    "bias_computed": "its bias is computed by the graph",
    "alone_on_input": "no other linear on its input can be merged",
    "input_not_uint8": "its input is not quantized to uint8 with one scale",
    "activation_bits": "there is no kernel for activations of {bits} bits: quantize and dequantize stay around floats",
    "side_not_uint8": "one side is not quantized to uint8 with one scale",
    "output_not_uint8": "its result is not quantized to uint8 with one scale",
    "weight_not_int8": "its weight is not stored in int8 with one scale per output channel",
    "weight_zero_points": "its weight has zero points, which no int8 op has; a target with a kernel for them reads it "
    "unfolded",
    "conv_scale_at_run_time": "conv has no int8 form with dynamic quantization",
    "conv_bias_computed": "conv has no int8 form with a computed bias",
    "bound_within_integers": "its result goes through a {op} tighter than the uint8 range",
    "integers_from_elsewhere": "its integers come from {maker}, and from no quantize of the same scale",
    "range_not_stored": "the range of its integers is computed, or another for each channel, and clip takes one",
    # rules of dialects
    "attention_mask_unfit": "the mask has {rank} axes, or enlarges the scores; attention takes 2 to 4 that fit",
    "attention_operands_broadcast": "queries, keys and values differ in batch or heads",
    "attention_operands_not_4d": "queries, keys or values are not 4-D",
    "attention_scores_unfit": "the softmax is over axis {axis} of {rank}; attention has it over the last of 4",
    "attention_without_product": "the softmax does not read a product of queries and keys",
    "linear_rows_regrouped": "the reshapes group rows differently: {before} becomes {after}",
    "linear_shapes_unknown": "the shapes around the linear are not known",
    "norm_bias_unfit": "the bias is not a constant of shape {shape}, as the weight is",
    "norm_epsilon_or_rank_unknown": "the epsilon is not a constant number, or the rank is unknown",
    "norm_mean_without_axis": "the mean drops its axis, so it broadcasts along another one",
    "norm_not_over_last_axis": "the mean is not over the last axis alone",
    "norm_weight_unfit": "the weight is not a constant of shape [{width}], the size of the last axis",
    "not_spelled": "what would replace it cannot be written: {reason}",
    "softmax_row_may_be_nan": "a row that is masked as a whole may be NaN",
    "transpose_reshapes_differ": "the reshapes do more than merge the batch axes and split them again",
    "transpose_shapes_unknown": "the shapes are not known to be 4-D",
    "rotary_angles_by_head": "the angles of a rotary embedding have shape {shape}: they are not one for each position, "
    "the same for all heads",
    "rotary_angles_differ": "the angles of a rotary embedding are not the same for both halves of a head",
    "rotary_angles_unknown": "the angles of a rotary embedding come from {found}, of which no half is known",
    "rotary_halves_differ": "a rotary embedding does not turn the two halves of a head into each other",
    "rotary_heads_unknown": "the heads of a rotary embedding, or their size, are not known",
    # rules of targets: ONNX Runtime
    "shape_changes": "its shape would go from {before} to {after}",  # any rule
    "residual_shapes_differ": "the two inputs of the residual add differ in shape",
    "residual_norm_unsupported": "the kernel takes two values (batch, length, width) of one shape, normalized over the "
    "width, not {x} and {residual}",
    "heads_unknown": "it is not known that its heads are split from, and joined to, the last axis",
    "heads_split_or_shared": "its heads are split by the graph, or queries share heads of keys",
    "head_size_unknown": "the size of its heads is not known",
    "head_size_not_divided": "the kernel takes heads whose size is a multiple of {multiple}, and these have {size}",
    "key_heads_shared": "several heads of queries share one of keys",
    "key_heads_not_shared": "it has as many heads of keys as of queries, or the graph splits them",
    "attention_causal": "it is causal: two products would need a mask of its length",
    "attention_not_causal": "it is not causal, or has a mask",
    "lengths_unnamed": "its lengths have no names, so that the mask may have others",
    "lengths_differ": "queries and keys are not of one length",
    "mask_unsupported": "its mask is not {expected}",
    "mask_not_causal": "it is not known that its mask allows no position after that of the query",
    "mask_shape_unknown": "the shape of its mask is not known",
    "projections_missing": "its query, key and value are not three linears",
    "projections_of_several_inputs": "its query, key and value are not computed from one input",
    "projections_read_elsewhere": "another node reads its query, key or value",
    "projections_computed": "a weight or a bias of its projections is computed by the graph",
    "projections_of_other_kind": "its projections are {found}, not {expected}",
    "projections_differ_in_width": "its query, key and value have the widths {widths}, which should be equal",
    "width_lost": "two axes have no fixed size, and the engine would lose the width that a split or attention needs",
    "int8_weight_computed": "its int8 weight is computed by the graph",
    "quantized_input_shared": "several linears share its quantized input",
    "quantized_input_not_shared": "no other linear reads its quantized input",
    "bias_too_large": "its bias, in units of input scale x weight scale, leaves no room for the sums in int32",
    "scales_computed": "its scales are computed by the graph",
    "scales_or_bias_computed": "its scales or its bias are computed by the graph",
    "one_image": "the batch has one image",
    "padding_beyond_window": "it is padded by {padding} rows, more than the {window} of a window beyond its first",
    "large_window": "its window has {pixels} pixels, more than {most}",
    "weight_not_in_integers": "its weight is not stored in integers",
    "weight_unsupported": "its weight has rank {rank} and {dtype}; the kernel takes a matrix of int8 or uint8",
    "blocks_unsupported": "no kernel takes blocks of {block} along axis {axis}",
    "stored_in_as_many_bits": "its weight has {bits} bits by itself",
    "stored_in_blocks": "its weight has blocks by itself, of {block}",
    "scale_per_input": "no kernel takes one scale per input",
    "activations_in_integers": "its activations are integers too",
    "activations_not_float32": "its activations are {dtype}, not float32",
    "ids_unsupported": "its ids are {dtype}, not int32 or int64",
    "rows_not_gathered": "no ONNX gather kernel takes rows below 8 bits, or these scales",
    "several_zero_points": "its weight has several zero points",
    # rules of targets: PyTorch on the CPU, CUDA
    "input_range_from_elsewhere": "the scale of the input is not computed by choose_qparams of that very input",
    "int8_result_needs_static_range": "the kernel gives an int8 result only if the range of its input is stored",
    "input_dtype": "the input is {dtype}, and {kernel} quantizes float32",
    "input_integers_unsupported": "the input is {dtype}, and the kernels read uint8",
    "residual_not_float32": "the added value is {dtype}, and the result is float32",
    "saturates": "the CPU sums products of uint8 and int8 in 16 bits, which saturate: weights are as large as "
    "{max_abs}, and {safe} is safe (bits=7)",
    "depthwise_saturates": "fbgemm sums products of depthwise convs in 16 bits, which saturate: weights are as large "
    "as {max_abs}, and {safe} is safe (bits=7)",
    "weight_not_stored_per_channel": "the weight is not stored with one scale per output channel",
    "linear_bias_computed": "the bias is computed by the graph, and the kernel packs it in advance",
    "conv_not_constant": "a scale, the weight or the bias is computed, or the input is not uint8",
    "add_shapes_differ": "the two sides differ in shape: {a} and {b}",
    "weight_not_8_bit": "the weight is not stored in 8 bits",
    "weight_has_zero_point": "the weight is {dtype} with zero points, or another type than int8 and float8",
    "weight_not_per_channel": "the weight has other scales than one per output",
    "float8_weight_only": "activations are not float8, and weights alone in float8 have no kernel",
    "activation_not_symmetric": "activations are {dtype}, and the kernels read {kernel} with zero point 0 on both "
    "sides",
    "activation_scale_shape": "activations have other scales than one per tensor or one per row",
    "too_much_padding": "8-bit kernels take multiples of {multiple}, and padding {outputs} x {inputs} would "
    "make it {growth:.2g} times as large",
    "weight_not_16_or_8_bit": "the weight is not stored in 16 or 8 bits",
    "not_a_multiple_for_2_4": "kernels for 2:4 take multiples of {outputs} x {inputs}, not {shape}",
    "not_2_4": "more than two of four neighbours in the weight are not zero",
    "triton_is_for_int8": "the Triton kernel is for int8",
    "triton_missing": "triton is not installed",
    # forms that are timed (lowering/timed_forms.py)
    "engine_refuses": "{error}",
    "form_shape_differs": "its result has the shape {shape}, not {expected}",
    "form_differs": "its result is {sqnr:.1f} dB from the first form's",
    "form_integers_differ": "its integers are more than one step from the first form's",
    # sites of two models (analysis/propagation.py, lowering/relower.py)
    "result_shapes_differ": "its result is {a} in one, and {b} in the other",
    "counterparts_differ": "the other model has {others} {op} of this path, not {count}",
    "no_counterpart": "it has no counterpart",
}
"""By code; `str.format` fills in the decline's values. A code of another package has no sentence here and is shown as
it is, with its values."""


class Reason(str):
    """The sentence of a decline, with its code and its values."""

    code: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, decline: Decline) -> Self:
        """Raises KeyError where the sentence of the code names a value that the decline lacks."""
        sentence = SENTENCES.get(decline.code)
        reason = cls(_without_sentence(decline) if sentence is None else sentence.format(**decline.values))
        reason.code, reason.values = decline.code, decline.values
        return reason

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also after JSON, which has lists for tuples. Raises KeyError where a part is missing."""
        reason = cls(plain["sentence"])
        reason.code, reason.values = plain["code"], dict(plain["values"])
        return reason

    def to_dict(self) -> dict[str, Any]:
        """Plain data: code, values, sentence."""
        return {"code": self.code, "values": dict(self.values), "sentence": str(self)}


def _without_sentence(decline: Decline) -> str:
    """The code and its values: `too wide (limit 0.5)`."""
    values = ", ".join(f"{name} {value}" for name, value in decline.values.items())
    return decline.code.replace("_", " ") + (f" ({values})" if values else "")

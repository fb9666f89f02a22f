"""GPT-2 as the graphs that OpenVINO and onnxruntime run at their best, made from a Hugging Face directory.

Both get int8 weights, and keys and values that stay in the program between two calls: OpenVINO as states of a
stateful model, onnxruntime as buffers that its GroupQueryAttention writes into in place.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.bench.names import past_names, present_name
from gpt2.model import GPT


class OpenVinoGraph(nn.Module):
    """Past keys and values in, all of them out; attention as one operator, which OpenVINO replaces by its own."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """(B, T) ids, (B, S + T) mask, (B, T) positions, 2 L times (B, nh, S, hs) -> (B, T, V) logits, the same + T."""
        model, config = self.model, self.model.config
        B, T = input_ids.shape
        width = config.n_embd // config.n_head  # as a number: the pipelines need shapes that are known
        x = model.wte(input_ids) + model.wpe(position_ids)  # (B, T, C)
        places = torch.arange(attention_mask.shape[1], device=x.device)  # (S + T,)
        queries = places[attention_mask.shape[1] - T :]  # (T,)
        mask = (places <= queries[:, None]) & attention_mask[:, None, None, :].bool()  # (B, 1, T, S + T)
        present: list[Tensor] = []
        blocks: Any = model.h
        for i, block in enumerate(blocks):
            q, k, v = (
                part.view(B, T, config.n_head, width).transpose(1, 2)  # (B, nh, T, hs)
                for part in block.attn.c_attn(block.ln_1(x)).split(config.n_embd, dim=-1)
            )
            k, v = torch.cat((past[2 * i], k), dim=2), torch.cat((past[2 * i + 1], v), dim=2)
            present += [k, v]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, config.n_embd))
            x = x + block.mlp(block.ln_2(x))
        return (model.lm_head(model.ln_f(x)), *present)


class _GroupQueryAttention(torch.autograd.Function):
    """Stands for onnxruntime's operator while the graph is traced; what it computes here is only of the right shape."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, last: Tensor, total: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.clone(), keys.clone(), values.clone()

    @staticmethod
    def symbolic(
        graph: Any, q: Any, k: Any, v: Any, keys: Any, values: Any, last: Any, total: Any, heads: int
    ) -> tuple[Any, Any, Any]:
        name = "com.microsoft::GroupQueryAttention"
        inputs = (q, k, v, keys, values, last, total)
        results = graph.op(name, *inputs, num_heads_i=heads, kv_num_heads_i=heads, outputs=3)
        for result, like in zip(results, (q, keys, values), strict=True):
            result.setType(like.type())
        return tuple(results)


class OnnxGraph(nn.Module):
    """All sequences of one length; logits of the last position only."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor, total: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """(B, T) ids, (1, T) positions, (B,) last position, (1,) its count, 2 L buffers (B, nh, S, hs) -> (B, 1, V)."""
        model, config = self.model, self.model.config
        x = model.wte(input_ids) + model.wpe(position_ids)  # (B, T, C)
        present: list[Tensor] = []
        blocks: Any = model.h
        for i, block in enumerate(blocks):
            q, k, v = block.attn.c_attn(block.ln_1(x)).split(config.n_embd, dim=-1)
            y, keys, values = _GroupQueryAttention.apply(  # type: ignore[no-untyped-call]
                q, k, v, past[2 * i], past[2 * i + 1], last, total, config.n_head
            )
            present += [keys, values]
            x = x + block.attn.c_proj(y)
            x = x + block.mlp(block.ln_2(x))
        return (model.lm_head(model.ln_f(x[:, -1:])), *present)


def write_openvino(model: Path, out: Path) -> None:
    """A stateful OpenVINO model with int8 weights (nncf, symmetric, a scale a channel) and its tokenizer, into `out`.

    The inputs are those that optimum-intel gives such a model, which the pipelines of openvino-genai look for.
    """
    import nncf
    import numpy as np
    import openvino
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    network = _unpadded(model)
    config = network.config
    pasts = past_names(config.n_layer)
    example = (
        torch.ones(2, 4, dtype=torch.long),
        torch.ones(2, 7, dtype=torch.long),
        torch.ones(2, 4, dtype=torch.long),
        [torch.zeros(2, config.n_head, 3, config.n_embd // config.n_head) for _ in pasts],
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(OpenVinoGraph(network).eval(), example_input=example)
    for port, name in zip(graph.inputs, ["input_ids", "attention_mask", "position_ids", *pasts], strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, ["logits", *map(present_name, pasts)], strict=True):
        port.get_tensor().set_names({name})

    # Which sequence's keys and values each row continues: the pipelines reorder them through this input.
    beams = ops.parameter(openvino.PartialShape([-1]), dtype=np.int32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beams])
    zero = ops.constant(0, dtype=np.int64)
    for name in pasts:
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = ops.gather(port.node, beams, zero)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {name: present_name(name) for name in pasts})

    # A state begins empty: (batch, nh, 0, hs).
    ids = graph.input("input_ids")
    rows = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0], dtype=np.int64), zero)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = list(node.get_output_partial_shape(0))[1:]
            sizes = [ops.constant(np.array([0 if d.is_dynamic else d.get_length()], dtype=np.int64)) for d in shape]
            empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([rows, *sizes], axis=0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
    graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(graph, out / "openvino_model.xml")
    (out / "config.json").write_text((model / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    encode, decode = convert_tokenizer(AutoTokenizer.from_pretrained(str(model)), with_detokenizer=True)
    openvino.save_model(encode, out / "openvino_tokenizer.xml")
    openvino.save_model(decode, out / "openvino_detokenizer.xml")


def write_onnx(model: Path, out: Path) -> None:
    """An ONNX file of onnxruntime's own attention operator, its matrices quantised dynamically to int8, into `out`."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    network = _unpadded(model)
    config = network.config
    pasts = past_names(config.n_layer)
    presents = [present_name(name) for name in pasts]
    example = (
        torch.ones(2, 4, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.long),
        torch.ones(2, dtype=torch.int32),
        torch.tensor([4], dtype=torch.int32),
        [torch.zeros(2, config.n_head, 16, config.n_embd // config.n_head) for _ in pasts],
    )
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "position_ids": {1: "tokens"}, "seqlens_k": {0: "batch"}}
    axes |= {"logits": {0: "batch"}} | {name: {0: "batch", 2: "room"} for name in pasts + presents}
    whole = out / "float.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OnnxGraph(network).eval(),
            example,
            str(whole),
            input_names=["input_ids", "position_ids", "seqlens_k", "total_sequence_length", *pasts],
            output_names=["logits", *presents],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,  # the exporter that takes an operator's symbolic form
            custom_opsets={"com.microsoft": 1},
        )
    logging.disable(logging.WARNING)
    quantize_dynamic(
        onnx.load(str(whole)),
        str(out / "model.onnx"),
        per_channel=True,
        reduce_range=True,  # without VNNI the sum of two products of 8 bits overflows 16
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    logging.disable(logging.NOTSET)
    whole.unlink()


def _unpadded(model: Path) -> GPT:
    """The network with vocab_size rows in its embedding, as every other program has it."""
    network = GPT.from_pretrained(model)
    config = network.config
    tied = network.lm_head.weight is network.wte.weight
    network.wte.weight = nn.Parameter(network.wte.weight[: config.vocab_size].clone())
    network.lm_head.weight = (
        network.wte.weight if tied else nn.Parameter(network.lm_head.weight[: config.vocab_size].clone())
    )
    return network

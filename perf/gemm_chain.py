"""The base layers of a decode step as the decoder launches them, for `kernels_gemm.py`: a chain of layers with
different weights, and the product with the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from kernels_timing import graph_us

from lorax_kernels.configs import GemmConfig
from lorax_kernels.fused_triton import rms_norm, rope_and_cache, silu_mul
from lorax_kernels.skinny_gemm import begin_linear, linear, linear_silu

MODELS = {"8b": (4096, 14336, 8, 128, 128256), "1b": (2048, 8192, 8, 64, 128256)}
"""Hidden size, inner size of the MLP, heads of keys, size of a head, vocabulary."""
_EPS = 1e-5
_BLOCK = 16  # tokens of a block of the cache
Configs = Mapping[str, GemmConfig]


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Columns and width of the weights of a model's layer."""
    hidden, inner, kv_heads, dim, _ = MODELS[name]
    return {
        "qkv": (hidden + 2 * kv_heads * dim, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


class Model:
    """`layers` layers of a model's base weights, bfloat16."""

    def __init__(self, name: str, layers: int) -> None:
        self.hidden, _, kv_heads, dim, self.vocabulary = MODELS[name]
        self.heads = self.hidden // dim, kv_heads
        self.shapes = shapes_of(name)
        torch.manual_seed(0)
        self.layers = [{site: _weight(*s) for site, s in self.shapes.items()} for _ in range(layers)]
        self.norm = torch.ones(self.hidden, dtype=torch.bfloat16, device="cuda")
        self.layer_bytes = sum(w.numel() * w.element_size() for w in self.layers[0].values())
        rope = torch.randn(2, 64, dim, device="cuda")
        self._rope = torch.arange(32, device="cuda"), *rope.unbind()
        cache = torch.zeros(2, 2, _BLOCK, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
        self._cache = cache[0], cache[1]
        self._slots = torch.arange(32, device="cuda")

    def product(self, site: str, x: torch.Tensor, weight: torch.Tensor, config: GemmConfig) -> torch.Tensor:
        """One weight's part of the chain; gate and up with SiLU and multiplication, the others perhaps as planes."""
        if site != "gate_up":
            return begin_linear(x, weight, None, config)
        whole = linear_silu(x, weight, None, config)
        return silu_mul(linear(x, weight, None, config)) if whole is None else whole

    def consume(self, site: str, made: torch.Tensor) -> torch.Tensor:
        """What reads the product of `site` next, but for gate and up."""
        rows = made.shape[-2]
        if site == "qkv":
            positions, cos, sin = self._rope
            rope = positions[:rows], cos, sin
            queries = rope_and_cache(made, self.heads, rope, self._cache, self._slots[:rows])
            return queries.view(rows, self.hidden)
        x = torch.zeros(rows, self.hidden, dtype=torch.bfloat16, device="cuda")
        return rms_norm(x, self.norm, _EPS, made)[0]

    def chain(self, rows: int, configs: Configs) -> Callable[[], torch.Tensor]:
        """All layers, one after the other, without attention."""
        start = torch.randn(rows, self.hidden, device="cuda").bfloat16()

        def call() -> torch.Tensor:
            x, block = start, None
            for layer in self.layers:
                y, x = rms_norm(x, self.norm, _EPS, block)
                made = self.product("qkv", y, layer["qkv"], configs["qkv"])
                block = self.product("o", self.consume("qkv", made), layer["o"], configs["o"])
                y, x = rms_norm(x, self.norm, _EPS, block)
                active = self.product("gate_up", y, layer["gate_up"], configs["gate_up"])
                block = self.product("down", active, layer["down"], configs["down"])
            return rms_norm(x, self.norm, _EPS, block)[0]

        return call

    def layer_us(self, rows: int, configs: Configs, rep: int) -> float:
        """Microseconds a layer."""
        return graph_us([self.chain(rows, configs)], rep) / len(self.layers)


class Head:
    """The weight of the product with the vocabulary, twice: one alone might stay in L2."""

    def __init__(self, model: Model) -> None:
        self.shapes = {"head": (model.vocabulary, model.hidden)}
        self.layers = [{"head": _weight(*self.shapes["head"])} for _ in range(2)]
        self.layer_bytes = self.layers[0]["head"].numel() * self.layers[0]["head"].element_size()

    def product(self, site: str, x: torch.Tensor, weight: torch.Tensor, config: GemmConfig) -> torch.Tensor:
        return linear(x, weight, None, config)

    def layer_us(self, rows: int, configs: Configs, rep: int) -> float:
        """Microseconds a product."""
        x = torch.randn(rows, self.shapes["head"][1], device="cuda").bfloat16()
        return graph_us(
            [lambda w=layer["head"]: self.product("head", x, w, configs["head"]) for layer in self.layers],
            rep,
        )


def _weight(columns: int, width: int) -> torch.Tensor:
    return torch.empty(columns, width, dtype=torch.bfloat16, device="cuda").normal_(0, width**-0.5)


class Reference:
    """Inputs of one number of rows for every weight, and their products in float64."""

    def __init__(self, model: Model | Head, rows: int) -> None:
        self._model = model
        self._cases = {}
        for site, weight in model.layers[0].items():
            x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()
            want = x.double() @ weight.double().T
            if site == "gate_up":
                gate, up = want.chunk(2, dim=1)
                want = torch.nn.functional.silu(gate) * up
            self._cases[site] = x, weight, want

    def error(self, configs: Configs) -> float:
        """The largest relative error of the products of the sites in `configs`."""
        errors = []
        for site, config in configs.items():
            x, weight, want = self._cases[site]
            made = self._model.product(site, x, weight, config).double()
            made = made.sum(0) if made.dim() == 3 else made
            errors.append(float((made - want).norm() / want.norm()))
        return max(error if error == error else float("inf") for error in errors)

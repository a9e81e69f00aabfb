"""TorchModelRunner: the ModelRunner of the engine, on CPU and CUDA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.config import ServerConfig
from lorax_backend.model.batch import BatchBuilder, Outputs
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.decoder import Decoder
from lorax_backend.model.graphs import DecodeGraphs, graph_sizes
from lorax_backend.model.greedy import NOT_HERE, GreedyDrawer
from lorax_backend.model.kv_cache import KvCache, block_bytes
from lorax_backend.model.limits import (
    CudaMemory,
    fit_limits,
    plan_adapter_pages,
    plan_cpu_blocks,
    plan_cuda_blocks,
    resolve_limits,
)
from lorax_backend.model.lora import page_layout
from lorax_backend.model.prefill_graphs import (
    PrefillGraphs,
    most_prefill_tokens,
    prefill_graph_bytes,
    prefill_graph_sizes,
)
from lorax_backend.model.prompt_scores import PromptScorer
from lorax_backend.model.recorder import CudaGraphRecorder, GraphRecorder
from lorax_backend.model.sampler import sample
from lorax_backend.model.sampling_plan import SamplingPlanner
from lorax_backend.model.startup import (
    StartTimes,
    check_backends,
    choose_attention,
    compile_ahead,
    largest_batch,
    max_blocks,
    pick_device,
    pick_dtype,
)
from lorax_backend.model.step import PendingStep
from lorax_backend.model.step_arrays import StepArrays
from lorax_backend.model.watermark import WatermarkSettings
from lorax_backend.model.weights import ModelWeights, dummy_weights, load_weights
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence
from lorax_backend.types import EngineInfo
from lorax_kernels.layout import PAGE_RANK

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


class TorchModelRunner:
    """Owns weights, adapter arena, KV cache and the per-slot state on one device.

    Implements `engine.protocols.ModelRunner`. The adapter manager writes to `arena` between launches, on the same
    thread. Attributes: model_config, layout, arena, num_blocks, dtype, device, limits.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: Path,
        progress: Progress | None = None,
        recorder: GraphRecorder | None = None,
    ) -> None:
        """Load the model and reserve all memory it will use.

        Args:
            recorder: makes graphs of steps; by default CUDA's, on CUDA if `cuda_graphs` says so, else none.
            progress: told what is being done, in words, a few times a second at most.

        Raises:
            ValueError: the model or an option cannot be used; the text says which and what to change.
        """
        self._config = config
        self._model_path = Path(model_path)
        times = StartTimes(progress or (lambda text: None))
        self.device = pick_device(config.device)
        self.model_config = ModelConfig.from_folder(self._model_path)
        self.dtype = pick_dtype(config.dtype, self.model_config, self.device)
        check_backends(config, self.device)
        on_cuda = self.device.type == "cuda"
        self._prefill_sizes = prefill_graph_sizes(
            most_prefill_tokens(config.prefill_graph_tokens, on_cuda, config.cuda_graphs)
        )
        self._recorder = recorder or (
            CudaGraphRecorder(self.device) if on_cuda and config.cuda_graphs else None
        )
        self.limits = resolve_limits(config, self.model_config, on_cuda)
        self.layout = page_layout(self.model_config)
        self._ahead = compile_ahead(
            config, self.model_config, self.dtype, self.device, self.limits, self._prefill_sizes, times
        )
        try:
            self._reserve(times)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.device} has too little free memory for {self._model_path}: {error}; use a smaller model, or "
                "lower adapter_pages, max_batch_tokens or cuda_memory_fraction"
            ) from error
        finally:
            kernels = self._ahead.close() if self._ahead is not None else ""
        self._start_times = "; ".join(filter(None, (times.told(), kernels)))
        log.info("start: %s", self._start_times)

    def _reserve(self, report: Progress) -> None:
        """Everything that takes memory, in the order in which each part's share is known."""
        config, on_cuda = self._config, self.device.type == "cuda"
        self.weights = self._load(report)
        total = torch.cuda.mem_get_info(self.device)[1] if on_cuda else None
        self.arena = LoraArena(
            self.layout,
            plan_adapter_pages(config, self.layout, self.dtype.itemsize, total),
            config.max_active_adapters,
            self.dtype,
            self.device,
            config.max_lora_rank,
        )
        self.page_writer = PageWriter(self.device) if on_cuda else None
        self.decoder = Decoder(
            self.model_config, self.weights, self.layout, self.arena.pages, self.limits.max_total_tokens
        )
        if self._ahead is not None:
            self._ahead.wait_for_attention()
        self._fresh = choose_attention(
            config, self.model_config, self.dtype, self.device, self.limits.max_batch_tokens, report
        )
        self.decoder.fresh_attention = self._fresh.function
        self._last_token = torch.zeros(self.limits.max_num_seqs, dtype=torch.int64, device=self.device)
        self._drawer = GreedyDrawer(self._last_token, self.model_config.vocab_size)
        self._planner = self._make_planner()
        if self._ahead is not None:
            self._ahead.wait()
        report("reserving the KV cache")
        self._cache = self._make_cache()
        self.limits = fit_limits(self.limits, config, self._cache.num_blocks)
        self._builder = self._make_builder()
        # Sampling has as many rows of logits, so the memory for them is there.
        self._scorer = PromptScorer(self._head, self.limits.max_num_seqs, self._builder.upload)
        self._ran_short = False
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        if self._recorder is not None:
            self._capture(self._recorder, report)

    @property
    def num_blocks(self) -> int:
        """KV blocks the cache holds."""
        return self._cache.num_blocks

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start one step; see `engine.protocols.ModelRunner.launch`."""
        if self._ran_short:
            # What the step that failed left behind may be in pieces too small for the next one.
            self._ran_short = False
            torch.cuda.empty_cache()
        try:
            return self._launch(batch)
        except torch.OutOfMemoryError as error:
            self._ran_short = True
            raise RuntimeError(
                f"{self.device} ran out of memory in a step of {batch.num_tokens} tokens; if this happens again, lower "
                f"cuda_memory_fraction or max_batch_tokens ({error})"
            ) from error

    def _launch(self, batch: ScheduledBatch) -> PendingStep:
        self._scorer.forget(batch.finished_slots)
        if self._graphs is not None and self._graphs.accepts(batch):
            return self._replay(batch.sequences, self._graphs)
        step = self._builder.arrays(batch)
        if self._prefill_graphs is not None and self._prefill_graphs.accepts(step):
            drawing = self._drawer.next(self._planner.greedy_mode(step.sampled))
            hidden, outputs = self._prefill_graphs.replay(step, drawing)
            return self._finish(outputs, hidden)
        return self._step(step, self._cache)

    def check_device(self) -> None:
        """See `engine.protocols.ModelRunner.check_device`: a CUDA context is lost with the first kernel that fails."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def info(self, load_seconds: float) -> EngineInfo:
        """Facts about this runner; `load_seconds` is what the caller measured."""
        config, limits = self._config, self.limits
        on_cuda = self.device.type == "cuda"
        return EngineInfo(
            model_id=config.model_id,
            model_type=self.model_config.model_type,
            dtype=str(self.dtype).removeprefix("torch."),
            device=f"{self.device} ({torch.cuda.get_device_name(self.device)})" if on_cuda else "cpu",
            attention_backend="triton" if on_cuda else "torch",
            lora_backend="triton" if on_cuda else "torch",
            num_blocks=self.num_blocks,
            block_size=config.block_size,
            adapter_pages=self.arena.num_pages,
            adapter_page_rank=PAGE_RANK,
            max_lora_rank=config.max_lora_rank,
            max_input_length=limits.max_input_length,
            max_total_tokens=limits.max_total_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            load_seconds=load_seconds,
            weight_bytes=self.weights.nbytes,
            kv_cache_bytes=self._cache.nbytes,
            adapter_arena_bytes=self.arena.nbytes,
            cuda_graph_batch_sizes=self._graphs.sizes if self._graphs is not None else (),
            prefill_attention=self._fresh.description,
            prefill_graph_tokens=self._prefill_graphs.sizes if self._prefill_graphs is not None else (),
            start_times=self._start_times,
        )

    @staticmethod
    def use_one_processor_a_thread() -> None:
        """Have torch compute with one processor in each thread of this process."""
        torch.set_num_threads(1)

    def close(self) -> None:
        """Free the device memory; the runner cannot be used afterwards."""
        for name in (
            "_graphs",
            "_prefill_graphs",
            "_recorder",
            "weights",
            "arena",
            "page_writer",
            "decoder",
            "_cache",
            "_builder",
            "_scorer",
            "_planner",
            "_drawer",
            "_last_token",
        ):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _load(self, report: Progress) -> ModelWeights:
        config = self._config
        if config.load_format == "dummy":
            report("making random weights")
            weights = dummy_weights(self.model_config, self.dtype, self.device, config.seed)
        else:
            weights = load_weights(self._model_path, self.model_config, self.dtype, self.device, report)
        weights.pack()
        return weights

    def _step(self, step: StepArrays, cache: KvCache) -> PendingStep:
        drawing = self._drawer.next(self._planner.greedy_mode(step.sampled))
        inputs = self._builder.build(step, self._last_token, drawing)
        hidden = self.decoder.forward(
            inputs.input_ids, inputs.positions, inputs.attention, inputs.lora, cache
        )
        return self._finish(inputs.outputs, hidden)

    def _finish(self, outputs: Outputs, hidden: torch.Tensor) -> PendingStep:
        """From the hidden rows [T, hidden] of a step to its tokens."""
        scores = self._score_prompts(outputs, hidden)
        if outputs.sampled_slots is None or outputs.control is None:
            return PendingStep.without_tokens(self.device)
        if outputs.logit_rows is not None:
            hidden = hidden.index_select(0, outputs.logit_rows)
        logits = self.decoder.logits(hidden, outputs.head_lora)
        if outputs.drawing is NOT_HERE:
            return self._sample(logits, outputs.sampled, outputs.sampled_slots, scores)
        self._drawer.draw(logits, outputs.control, outputs.sampled_slots)
        return self._drawer.pending(outputs.drawing, outputs.sampled, scores)

    @torch.inference_mode()
    def _capture(self, recorder: GraphRecorder, report: Progress) -> None:
        parts = self.decoder, self._cache, self._builder
        sizes = graph_sizes(self.limits.max_num_seqs)
        self._graphs = DecodeGraphs(*parts, self._drawer, sizes, recorder, report)
        if not self._prefill_sizes:
            return
        try:
            self._prefill_graphs = PrefillGraphs(
                *parts, self._last_token, self._prefill_sizes, recorder, report
            )
        except RuntimeError as error:
            # Decoding has its graphs, and steps with prompts run without: slower to start an answer, but right.
            log.exception("prefill_graph_tokens %d: no graphs", self._prefill_sizes[-1])
            report(f"prefill graphs are OFF, capturing them failed: {error}")

    def _replay(self, items: list[ScheduledSequence], graphs: DecodeGraphs) -> PendingStep:
        head_lora = self._builder.head_batch(items)
        # A graph's logits lack what adapters add to lm_head, so it cannot draw from them then.
        drawing = NOT_HERE if head_lora else self._drawer.next(self._planner.greedy_mode(items))
        hidden, logits, slots = graphs.replay(items, drawing)
        if drawing is not NOT_HERE:
            return self._drawer.pending(drawing, items)
        if head_lora is not None:
            logits = self.decoder.logits(hidden, head_lora)
        return self._sample(logits, items, slots, {})

    def _score_prompts(self, outputs: Outputs, hidden: torch.Tensor) -> dict[int, torch.Tensor]:
        """Log probabilities of the prompts that this step completes, by the row that samples."""
        scores = {}
        for item, first in outputs.scored:
            done = self._scorer.add(item, hidden[first : first + item.count])
            if done is not None and item.sample and item.generated_index == 0:
                scores[next(row for row, other in enumerate(outputs.sampled) if other is item)] = done
        return scores

    def _head(self, hidden: torch.Tensor, adapter_slot: int) -> torch.Tensor:
        return self.decoder.logits(hidden, self._builder.head_lora(adapter_slot, len(hidden)))

    def _sample(
        self,
        logits: torch.Tensor,
        sampled: list[ScheduledSequence],
        slots: torch.Tensor,
        scores: dict[int, torch.Tensor],
    ) -> PendingStep:
        """Draw a token for each row of the logits, which are `sampled` in `slots`, and start the copy to the host."""
        plan = self._planner.plan(sampled, self._last_token, self._builder.upload)
        drawn = sample(logits, plan)
        self._planner.count_drawn(plan, drawn.ids)
        self._last_token.index_copy_(0, slots, drawn.ids)
        return PendingStep.of(drawn, [item.seq.sampling.top_logprobs for item in sampled], scores)

    def _make_builder(self) -> BatchBuilder:
        return BatchBuilder(
            block_size=self._config.block_size,
            max_num_seqs=self.limits.max_num_seqs,
            max_blocks=max_blocks(self.limits, self._config.block_size),
            device=self.device,
            arena=self.arena,
            vocab_size=self.model_config.vocab_size,
        )

    def _make_planner(self) -> SamplingPlanner:
        config = self._config
        return SamplingPlanner(
            self.model_config.vocab_size,
            self.limits.max_num_seqs,
            self.device,
            WatermarkSettings(config.watermark_gamma, config.watermark_delta),
        )

    def _make_cache(self) -> KvCache:
        config = self._config
        size = block_bytes(self.model_config, config.block_size, self.dtype)
        if config.block_size < 1:
            raise ValueError(f"block_size is {config.block_size}; it must be at least 1")
        if self.device.type == "cuda":
            num_blocks = plan_cuda_blocks(config, self._measure_memory(), size)
        else:
            num_blocks = plan_cpu_blocks(config, size)
        return KvCache(self.model_config, num_blocks, config.block_size, self.dtype, self.device)

    def _measure_memory(self) -> CudaMemory:
        """Run the largest step there is, on a cache of its own, and see what it takes. It runs twice: what the first
        leaves behind, such as workspaces and the table of occurrences, is no part of what each step takes."""
        batch = largest_batch(self.limits, self._config.block_size)
        blocks = 1 + max(max(item.seq.block_table) for item in batch.sequences)
        cache = KvCache(self.model_config, blocks, self._config.block_size, self.dtype, self.device)
        self._builder = self._make_builder()
        before = 0
        for _ in range(2):
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            with torch.inference_mode():
                self._step(self._builder.arrays(batch), cache).result()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del cache
        self._planner = self._make_planner()  # its table is made when a request needs it
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        graphs = prefill_graph_bytes(
            self.model_config,
            max(self._prefill_sizes, default=0),
            self.dtype.itemsize,
            self.arena.max_pages_per_slot,
        )
        return CudaMemory(free, total, peak, self._planner.table_bytes, graphs if self._recorder else 0)

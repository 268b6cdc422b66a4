"""llama.cpp through the functions of its own C interface, several sequences in one batch.

Only prompt lookup goes through the class Llama, where the Python package has it.
"""

import ctypes

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

BATCH = 512  # tokens at once, llama.cpp's own default


class Driver:
    version = f"llama-cpp-python {llama_cpp.__version__}"

    def load(self, model, precision, threads):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p())
        self.path = model
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        self.threads = threads
        self.contexts = {}
        self.lookup = {}

    def can(self, task):
        return task.num_beams == 1 and not task.no_repeat_ngram_size

    def generate(self, task):
        if task.prompt_lookup:
            return [self._look_up(prompt, task) for prompt in task.prompts]
        longest = max(map(len, task.prompts)) + task.new_tokens
        context = self._context(len(task.prompts), -(-longest // 256) * 256)
        sampler = _sampler(task.sampling)
        batch = llama_cpp.llama_batch_init(BATCH, 0, len(task.prompts))
        rows = [[] for _ in task.prompts]
        entries = [(t, i, row, i == len(p) - 1) for row, p in enumerate(task.prompts) for i, t in enumerate(p)]
        for begin in range(0, len(entries), BATCH):
            self._step(context, batch, sampler, entries[begin : begin + BATCH], rows)
        for step in range(task.new_tokens - 1):
            entries = [
                (row[-1], len(p) + step, i, True) for i, (p, row) in enumerate(zip(task.prompts, rows, strict=True))
            ]
            self._step(context, batch, sampler, entries, rows)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_sampler_free(sampler)
        return rows

    def first_token(self, model, text):
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        ids, piece, text = (ctypes.c_int32 * 256)(), ctypes.create_string_buffer(64), text.encode()
        count = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, 256, True, False)
        [[token]] = self.generate(_Greedy([list(ids[:count])]))
        length = llama_cpp.llama_token_to_piece(vocabulary, token, piece, 64, 0, False)
        return piece.raw[:length].decode(errors="replace")

    def _context(self, sequences, positions):
        if (sequences, positions) not in self.contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = sequences * positions
            parameters.n_seq_max = sequences
            parameters.n_batch = parameters.n_ubatch = BATCH
            parameters.n_threads = parameters.n_threads_batch = self.threads
            self.contexts[sequences, positions] = llama_cpp.llama_init_from_model(self.model, parameters)
        context = self.contexts[sequences, positions]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _step(self, context, batch, sampler, entries, rows):
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for i, (_, _, row, wanted) in enumerate(entries):
            if wanted:
                rows[row].append(llama_cpp.llama_sampler_sample(sampler, context, i))

    def _look_up(self, prompt, task):
        if task.prompt_lookup not in self.lookup:
            draft = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=task.prompt_lookup)
            self.lookup[task.prompt_lookup] = llama_cpp.Llama(
                self.path, n_ctx=512, n_threads=self.threads, n_threads_batch=self.threads, draft_model=draft,
                logits_all=True, verbose=False,
            )  # fmt: skip
        llama = self.lookup[task.prompt_lookup]
        llama.reset()  # or the prompt would be found in the cache
        sampling = {"temp": 0.0}
        if task.sampling:
            llama.set_seed(int(task.sampling["seed"]))
            sampling = {"temp": task.sampling["temperature"], "top_k": int(task.sampling["top_k"])}
            sampling["top_p"] = task.sampling["top_p"]
        tokens = llama.generate(prompt, min_p=0.0, repeat_penalty=1.0, **sampling)
        return [token for token, _ in zip(tokens, range(task.new_tokens), strict=False)]


class _Greedy:
    """A task of one token, as a plain process makes it."""

    new_tokens, num_beams, no_repeat_ngram_size, sampling, prompt_lookup = 1, 1, 0, None, 0

    def __init__(self, prompts):
        self.prompts = prompts


def _sampler(sampling):
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if sampling is None:
        parts = [llama_cpp.llama_sampler_init_greedy()]
    else:
        parts = [
            llama_cpp.llama_sampler_init_top_k(int(sampling["top_k"])),
            llama_cpp.llama_sampler_init_top_p(sampling["top_p"], 1),
            llama_cpp.llama_sampler_init_temp(sampling["temperature"]),
            llama_cpp.llama_sampler_init_dist(int(sampling["seed"])),
        ]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


@llama_cpp.llama_log_callback
def _silence(level, text, data):
    pass

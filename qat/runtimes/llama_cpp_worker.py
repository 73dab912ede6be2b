"""What runs llama.cpp, in a process of its own: it needs ``llama_cpp`` and numpy, and nothing of this package.

    python llama_cpp_worker.py FILE THREADS          # FILE: what `qat.deploy.gguf` wrote

Requests come on standard input, replies go to standard output; each is one line of JSON:

    (first)                         {"architecture": .., "blocks": .., "length": .., "vocabulary": .., "system": ..}
    {"tokens": [[..], ..]}          {"shape": [sequences, tokens, vocabulary], "operators": [..]}, then float32 numbers
    {"text": ..}                    {"tokens": [..]}
    (anything)                      {"error": ..}, what llama.cpp has against it

Keys, values and attention are float32, so that what is left of differences comes from the products with weights.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, BinaryIO

MULTIPLIES = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")


class Node(ctypes.Structure):
    """``struct ggml_tensor`` of ``ggml.h``, as far as it is read."""


Node._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]


class Traits(ctypes.Structure):
    """``struct ggml_type_traits_cpu`` of ``ggml-cpu.h``."""

    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p), ("vec_dot_type", ctypes.c_int)]


class Graph:
    """Reads the nodes that llama.cpp is about to compute."""

    def __init__(self, folder: str) -> None:
        base = ctypes.CDLL(os.path.join(folder, "libggml-base.so"))
        cpu = ctypes.CDLL(os.path.join(folder, "libggml-cpu.so"))
        self.nodes: dict[tuple[str, ...], int] = {}
        self.fault = ""

        def text(function: str, *arguments: Any) -> Any:
            call = getattr(base, function)
            call.restype, call.argtypes = ctypes.c_char_p, list(arguments)
            return lambda *given: (call(*given) or b"").decode()

        self.type_name, self.op_name = text("ggml_type_name", ctypes.c_int), text("ggml_op_name", ctypes.c_int)
        self.node_name = text("ggml_get_name", ctypes.c_void_p)
        self.buffer_name = text("ggml_backend_buffer_name", ctypes.c_void_p)
        self.traits = cpu.ggml_get_type_traits_cpu
        self.traits.restype, self.traits.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]

    def see(self, address: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback; False: go on, the result is not wanted."""
        node = ctypes.cast(address, ctypes.POINTER(Node)).contents
        if node.name.decode() != self.node_name(address):
            self.fault = "this version of llama.cpp has another struct ggml_tensor than the one that is read here"
        elif ask and self.op_name(node.op) in MULTIPLIES and node.src[0]:
            weight, values = node.src[0].contents, node.src[1].contents
            if weight.name.decode().endswith(".weight"):
                kind = self.type_name(values.type)
                if self.op_name(node.op) != "GET_ROWS":         # activations become what the weight's kernel takes
                    kind = self.type_name(self.traits(weight.type).contents.vec_dot_type)
                buffer = self.buffer_name(weight.buffer) if weight.buffer else ""
                key = (weight.name.decode(), self.op_name(node.op), buffer, kind, self.type_name(weight.type),
                       self.type_name(node.type))
                self.nodes[key] = self.nodes.get(key, 0) + 1
        return False


def reply(out: BinaryIO, content: dict[str, Any], data: bytes = b"") -> None:
    out.write(json.dumps(content).encode() + b"\n" + data)
    out.flush()


def tokenized(library: Any, model: Any, text: bytes) -> dict[str, Any]:
    """A text in tokens, special ones in it recognized."""
    vocabulary = library.llama_model_get_vocab(model)
    if not library.llama_vocab_type(vocabulary):        # LLAMA_VOCAB_TYPE_NONE: llama.cpp would end the process
        return {"error": "the file has no tokenizer: give source= when exporting"}
    tokens = (ctypes.c_int32 * (len(text) + 8))()
    count = library.llama_tokenize(vocabulary, text, len(text), tokens, len(tokens), True, True)
    return {"tokens": list(tokens[:count])} if count >= 0 else {"error": f"llama_tokenize: {count}"}


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                   # what llama.cpp prints goes to standard error
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))      # where another llama_cpp lies
    import llama_cpp as library
    import numpy as np

    said: list[str] = []
    log = library.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace"))
                                     if level >= 3 else None)
    library.llama_log_set(log, ctypes.c_void_p(0))
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.check_tensors, options.n_gpu_layers = True, 0
    model = library.llama_model_load_from_file(sys.argv[1].encode(), options)
    if not model:
        return reply(out, {"error": "".join(said).strip()})
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    architecture = ctypes.create_string_buffer(128)
    library.llama_model_meta_val_str(model, b"general.architecture", architecture, 128)
    graph = Graph(os.path.join(os.path.dirname(library.__file__), "lib"))
    callback = library.llama_cpp.ggml_backend_sched_eval_callback(graph.see)
    reply(out, {"architecture": architecture.value.decode(), "blocks": library.llama_model_n_layer(model),
                "length": library.llama_model_n_ctx_train(model), "vocabulary": vocabulary,
                "system": library.llama_print_system_info().decode()})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "text" in request:
            reply(out, tokenized(library, model, request["text"].encode()))
            continue
        tokens = np.array(request["tokens"], dtype=np.int32)
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens.shape[1]
        settings.n_threads = settings.n_threads_batch = int(sys.argv[2])
        settings.type_k = settings.type_v = 0       # GGML_TYPE_F32
        settings.flash_attn_type = 0                # disabled
        settings.cb_eval = callback
        graph.nodes.clear()
        rows = []
        for sequence in tokens:
            context = library.llama_init_from_model(model, settings)
            if not context:
                return reply(out, {"error": "".join(said).strip()})
            batch = library.llama_batch_init(len(sequence), 0, 1)
            batch.n_tokens = len(sequence)
            for place, token in enumerate(sequence):
                batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            failed = library.llama_decode(context, batch)
            if failed or graph.fault:
                return reply(out, {"error": graph.fault or f"llama_decode: {failed}; {''.join(said).strip()}"})
            logits = library.llama_get_logits(context)
            rows.append(np.ctypeslib.as_array(logits, (len(sequence), vocabulary)).astype(np.float32))
            library.llama_batch_free(batch)
            library.llama_free(context)
        result = np.stack(rows)
        operators = [[*key, count // len(tokens)] for key, count in graph.nodes.items()]
        reply(out, {"shape": list(result.shape), "operators": operators}, result.tobytes())


if __name__ == "__main__":
    main()

"""How much is read or made of what comes from outside. docs/reliability.md lists these limits."""

from numbers import Integral

from gpt2onnx.errors import OptionError

from .messages import shown

MIB = 2**20

# Bytes of files. JSON takes up to some twenty times its size in memory; the largest vocabularies have 35 million.
JSON = 16 * MIB
JSON_LEVELS = 100
TOKENIZER_JSON = 64 * MIB
SENTENCEPIECE = 16 * MIB  # the largest published model has 5 million
GRAPH = 64 * MIB  # without its weights
KEY_FILE = MIB
TEMPLATE = MIB
PICKLE = 16 * MIB
TENSOR_HEADER = 16 * MIB  # some 100 bytes for each tensor
ARCHIVE_MANIFEST = MIB
ARCHIVE_CONTENT = 10_000_000_000  # unless --max-size allows more
# Numbers in config.json. No real network comes near these; one without end would only be found out after memory has run out.
LAYERS = 10_000
DIMENSION = 2**31 - 1
# Numbers that a constant may have an operator of a graph make. Graphs of a network 12,288 wide ask for 4.7 million.
CONSTANT = 2**26
# Steps of a tokenizer, and how many letters they may make of one. ALBERT's has 7 steps, which may make 650.
TOKENIZER_STEPS = 32
TOKENIZER_GROWTH = 5000
# Merges that the pieces of a sentencepiece model make. Vocabularies of 256,000 pieces make some 600,000.
MERGES = 1_000_000
# Bytes of a text, a line of which is a request.
TEXT = 256 * MIB
LINE = 16 * MIB
RESULT = 64 * MIB  # what is looked at to tell results from other files
# Steps of a pickle: objects, and 64 bytes of text each.
PICKLE_STEPS = 1_000_000
# Entries of a generation option: strings and token sequences, each of which every step compares; and plain token ids.
OPTION_SEQUENCES = 10_000
OPTION_IDS = 1_000_000
# Of a schema, expression or grammar: letters; brackets in brackets; references, or colons of a grammar, each of which may begin a
# rule. llguidance follows both by recursion, and 2,000 end the process. A long expression takes minutes to compile.
STRUCTURE_LETTERS = {"json_schema": 64 * 1024, "grammar": 32 * 1024, "regex": 32 * 1024}
STRUCTURE_LEVELS = 100
STRUCTURE_REFERENCES = 500
THREADS = 1024  # of one operator
SEQUENCES = 1000  # of one prompt; each has a row of the KV cache
# Letters of a prompt for each position of the context window. A longer one is refused before it is cut into tokens, as is one
# with more bytes for each position than twice the longest token has.
LETTERS_PER_TOKEN = 1000
# Connections of a server; never more than half of the process's open files. Bytes of bodies that haven't arrived as a whole.
CONNECTIONS = 4096
BODIES = 64 * MIB
# Seconds of a step of the server's batch. 1,024 tokens are 3 TFLOP for GPT-2 XL: half a minute on two cores.
PASS_SECONDS = 300.0
# Seconds for a request's headers, its body, a client to read what fills the buffer, and between two requests of a connection.
HEADER_SECONDS = 30.0
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0
IDLE_SECONDS = 30


def check_at_least(least: int, **given: object) -> None:
    """Raises OptionError for what isn't a whole number, or below the least."""
    for name, value in given.items():
        if not (isinstance(value, Integral) and int(value) >= least):
            raise OptionError(f"{name} must be a whole number, at least {least}, not {shown(value)}")

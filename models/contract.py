"""The tensor contract: names of a graph's inputs and outputs, the only graph knowledge both sides share.

The names and axes are those of optimum's text-generation export, so that other runtimes load the graph:

    input_ids                     int64   [batch_size, sequence_length]
    attention_mask                int64   [batch_size, total_sequence_length]    1 for each position in use, from the left
    position_ids                  int64   [batch_size, sequence_length]
    past_key_values.{i}.key       float   [batch_size, heads, past_sequence_length, head_size]
    past_key_values.{i}.value     float   [batch_size, heads, past_sequence_length, head_size]
    logits_to_keep                int64   [1]    optional; number of last positions with logits, all by default
    logits                        float   [batch_size, kept_sequence_length, vocab_size]
    present.{i}.key, .value       float   [batch_size, heads, total_sequence_length, head_size]

What our own runtime runs on the CPU lets each row of a pass bring its own number of tokens (`exporter.graph.ragged`):

    input_ids                     int64   [batch_size, longest]     right-padded
    past_lengths                  int64   [batch_size]              tokens of each row in the cache
    counts                        int64   [batch_size]              valid tokens of each row; 0 leaves the row as it is
    logits_at                     int64   [logits]                  flat positions in [batch_size, longest]
    past_key_values.{i}.*, present.{i}.*                            as above, one memory for both
    logits                        float   [logits, 1, vocab_size]

Where a bundle also has the network in two parts, its body gives `hidden_states` in place of `logits`, and its head makes the
one of the other; a third graph is a head that screens, whose weights `estimates.*` are made at runtime (`runtime.screening`):

    hidden_states                 float   [batch_size, kept_sequence_length, width]; where logits are screened, [positions, width]
    balanced                      float   [positions, width]         what the estimates' rows are multiplied with
    common                        float   [positions, 1]             added to the estimates at each position
    candidates                    int64   [1]                        number of highest estimates that are computed again in full
    highest                       float   [positions, candidates]    these estimates, in descending order
    head.weight                   float   [vocab_size, width]        the head's rows, as they lie in the bundle's file
    estimates.rows                uint8   [vocab_size, blocks, block_size]
    estimates.scales              float   [vocab_size, blocks]
    estimates.bias                float   [vocab_size]
"""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS_TO_KEEP = "logits_to_keep"
PAST_LENGTHS = "past_lengths"
COUNTS = "counts"
LOGITS_AT = "logits_at"
KEPT = "kept"  # the last hidden states whose logits are computed, inside the graph
LOGITS = "logits"
HIDDEN_STATES = "hidden_states"
BALANCED = "balanced"
COMMON = "common"
CANDIDATES = "candidates"
HIGHEST = "highest"
HEAD = "head.weight"
ESTIMATES = ("estimates.rows", "estimates.scales", "estimates.bias")


def past_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cached keys and values, as they enter the graph."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of one layer's keys and values, as they leave the graph."""
    return f"present.{layer}.key", f"present.{layer}.value"

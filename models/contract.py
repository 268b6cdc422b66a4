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
    past_key_values.{i}.*, present.{i}.*                            as above or int8, one memory for both
    logits                        float   [logits, 1, vocab_size]
    kept                          float   [logits, 1, width]        hidden states that the logits are computed from
"""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS_TO_KEEP = "logits_to_keep"
PAST_LENGTHS = "past_lengths"
COUNTS = "counts"
LOGITS_AT = "logits_at"
HIDDEN = "kept"  # hidden states behind the final layer norm; bundles of earlier versions don't return them
LOGITS = "logits"


def past_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cached keys and values, as they enter the graph."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of one layer's keys and values, as they leave the graph."""
    return f"present.{layer}.key", f"present.{layer}.value"

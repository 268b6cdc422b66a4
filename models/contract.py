"""The tensor contract: names of a graph's inputs and outputs, the only graph knowledge both sides share.

The names and axes are those of optimum's text-generation export, so that other runtimes load the graph:

    input_ids                     int64   [batch_size, sequence_length]
    attention_mask                int64   [batch_size, total_sequence_length]    1 for each position in use, from the left
    position_ids                  int64   [batch_size, sequence_length]
    past_key_values.{i}.key       float   [batch_size, heads, past_sequence_length, head_size]
    past_key_values.{i}.value     float   [batch_size, heads, past_sequence_length, head_size]
    logits_to_keep                int64   [1]    optional; logits of so many last positions, all by default
    logits                        float   [batch_size, kept_sequence_length, vocab_size]
    present.{i}.key, .value       float   [batch_size, heads, total_sequence_length, head_size]

A graph that screens logits has two more, both optional:

    certain                       int64   [1]    so many largest logits at each position are exact, others may be estimates below
    candidates                    int64   [1]    so many of the highest estimates are computed in full; 0, the default: all logits
"""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS_TO_KEEP = "logits_to_keep"
CERTAIN = "certain"
CANDIDATES = "candidates"
LOGITS = "logits"


def past_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cached keys and values, as they enter the graph."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of one layer's keys and values, as they leave the graph."""
    return f"present.{layer}.key", f"present.{layer}.value"

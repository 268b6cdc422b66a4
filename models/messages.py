"""Values and other libraries' errors, as error messages show them."""

_LONGEST = 80  # letters


def shown(value: object) -> str:
    """A value as an error message shows it: always short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, lists in lists in lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def one_line(error: BaseException) -> str:
    """An error's message in one line, without runs of spaces."""
    return " ".join(str(error).split())

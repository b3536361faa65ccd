"""What the pages in docs/benchmarks share: results first, how they were made folded away."""


def folded(summary: str, text: str) -> str:
    """Markdown that GitHub and the site show as one line until it is opened.

    Args:
        summary: the line, without Markdown.
        text: Markdown.
    """
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n'

"""One short chat in each form that is read, and as plain text."""

OPENAI = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": "Because."},
    {"role": "assistant", "content": None, "tool_calls": []},
]
PLAIN = "user: Why?\n\nassistant: Because."

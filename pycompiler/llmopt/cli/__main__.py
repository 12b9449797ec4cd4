"""`python -m llmopt.cli`: the same as `llmopt`, for where scripts are not on the path."""

from llmopt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

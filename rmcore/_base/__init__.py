"""What every part of rmcore may use, and what uses no other part: errors, prompts, clocks, loops, HTTP, files."""

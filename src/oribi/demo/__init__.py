"""The demo: a small chat model learns to turn an English schedule into a cron expression."""

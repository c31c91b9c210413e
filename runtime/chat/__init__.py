"""Conversations as prompts: messages and their checks, chat templates, and the control tokens that only they write."""

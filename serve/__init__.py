"""The generator behind bulk work: lists of prompts, on one machine or many."""

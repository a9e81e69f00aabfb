"""Adapters: where they come from, how they are read and checked, and which of them are near the device."""

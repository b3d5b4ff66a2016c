"""The cpu device: `puna.ops` recorded for the native library (`puna.native`), torch-free."""

//! A function as its transport sees it.

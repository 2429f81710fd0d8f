-- Contexts, in the ledger: the captions of an image and the boxes of its objects, and what they were made from.
CREATE TABLE IF NOT EXISTS contexts (
  number INTEGER PRIMARY KEY,      -- from 0 on, in the order of the file
  id TEXT NOT NULL UNIQUE,
  image TEXT NOT NULL,             -- its name in the image folder
  captions TEXT NOT NULL,          -- JSON: list of text
  boxes TEXT NOT NULL              -- JSON: list of [category, x1, y1, x2, y2]
);
CREATE TABLE IF NOT EXISTS contexts_of (
  files TEXT NOT NULL,             -- JSON: digests of the files
  left_out TEXT NOT NULL           -- JSON: the number of images left out for each reason
);

CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
  id INTEGER PRIMARY KEY,
  task TEXT NOT NULL,              -- that the request is for
  attempt INTEGER NOT NULL,        -- 0 first, 1, 2, ... when asked again since the answer was not good
  prompt_hash TEXT NOT NULL,       -- SHA-256 of the messages
  model TEXT NOT NULL,
  parameters TEXT NOT NULL,        -- JSON
  state TEXT NOT NULL,             -- sent, batched, answered, failed, unsent (by its batch), lost (the process died)
  sent REAL NOT NULL,              -- seconds since 1970
  finished REAL,
  prompt_tokens INTEGER,           -- estimated until the answer comes
  completion_tokens INTEGER,
  usage TEXT,                      -- reported by the server, or estimated
  cost REAL NOT NULL DEFAULT 0,    -- dollars; an upper bound as long as the charge is not known
  answer TEXT,                     -- as it came, with its thinking; NULL where it had no text
  finish_reason TEXT,
  verdict TEXT,                    -- accepted, or why the answer was not good
  error TEXT,
  batch INTEGER                    -- in which it is sent
);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON requests (task, attempt) WHERE state = 'answered';
CREATE INDEX IF NOT EXISTS of_task ON requests (task, attempt);
CREATE INDEX IF NOT EXISTS under_way ON requests (state) WHERE state = 'sent';
CREATE INDEX IF NOT EXISTS of_batch ON requests (batch) WHERE state = 'batched';
CREATE TABLE IF NOT EXISTS batches (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL,              -- in the server's metadata, by which a batch is found whose id was not noted
  made REAL NOT NULL,              -- seconds since 1970, before anything is sent
  id TEXT,                         -- the server's
  done INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS results (
  task TEXT PRIMARY KEY,
  verdict TEXT NOT NULL,           -- accepted, or the reason of the rejection
  value TEXT                       -- JSON
) WITHOUT ROWID;

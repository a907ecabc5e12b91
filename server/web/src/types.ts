/** What the API sends, as far as the page reads it. */

export interface ProfileCard {
  name: string;
  method: string;
  fingerprint: string;
  strength: number;
  default: boolean;
  identity: boolean;
  folded: boolean;
  red_team: boolean;
  derived_base: boolean;
  layers: number;
  edits: EditCard[];
  card: { summary?: string; held_out?: HeldOut } & Record<string, unknown>;
  provenance: Record<string, unknown>;
}

export interface EditCard {
  site: string;
  rank: number;
  shift: boolean;
  phase: "prompt" | "generation" | "all";
  gate: { site: string; reduce: string; kind: string } | null;
}

export interface HeldOut {
  held_out?: string;
  f1?: number;
  kinds?: Record<
    string,
    { prompts: number; refusal_rate: number; refusal_rate_95: [number, number] }
  >;
}

export type Outcome = "answer" | "refusal" | "degenerate" | "empty" | "error";

/** Read with the prompt; null where nothing was read. */
export interface PromptScores {
  refusal_score: number | null;
  answer_probability: number | null;
  benign_probability: number | null;
  prompt_class?: "harmful" | "benign" | "unknown" | null;
  edit_norm?: number | null;
}

/** Read when a token was chosen. `offset`: characters of the reply before it, in code points. */
export interface TokenTrace {
  token: string;
  offset: number;
  answer_probability: number | null;
  benign_probability: number | null;
  edit_norm: number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

export interface ApiErrorBody {
  message: string;
  type?: string;
  param?: string | null;
  code?: string;
}

export interface CompareChoice {
  index: number;
  delta: { role?: string; content?: string };
  finish_reason: "stop" | "length" | "error" | null;
  steering?: {
    profile?: string;
    fingerprint?: string;
    strength?: number | null;
    outcome?: Outcome | null;
    trace?: TokenTrace[] | null;
    prompt?: PromptScores;
  } & Partial<PromptScores>;
  usage?: Usage;
  error?: ApiErrorBody;
}

export interface CompareChunk {
  choices?: CompareChoice[];
  usage?: Usage;
  error?: ApiErrorBody;
}

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface CompareRequest {
  model?: string;
  messages: Message[];
  arms: { profile: string; strength?: number; messages?: Message[] }[];
  temperature: number;
  max_tokens?: number;
  seed: number;
  trace: boolean;
  stream: boolean;
}

// The model in a thread of its own: loads it, continues conversations, answers its calls of the calculator.
import {
  AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, Tensor, env,
} from "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.2";
import { calculate } from "./calculator.js";

const stop = new InterruptableStoppingCriteria();
let model, tokenizer, mark, cache = { ids: [] };

async function load(name, device) { // "model" is the folder beside this file, any other a repository of the Hub
  env.allowRemoteModels = !(env.allowLocalModels = name === "model");
  env.localModelPath = new URL(".", location.href).pathname;
  const adapter = device === "wasm" ? null : await navigator.gpu?.requestAdapter();
  const dtype = !adapter ? "q8" : adapter.features.has("shader-f16") ? "fp16" : "fp32";
  const paths = env.backends.onnx.wasm.wasmPaths; // without WebGPU, half as large
  if (!adapter) for (const kind in paths) paths[kind] = paths[kind].replace(".asyncify", "");
  const progress_callback = event => event.status === "progress_total" && postMessage({ progress: event.progress });
  tokenizer = await AutoTokenizer.from_pretrained(name);
  model = await AutoModelForCausalLM.from_pretrained(
    name, { device: adapter ? "webgpu" : "wasm", dtype, progress_callback });
  const forward = model.forward.bind(model);
  let pause = 0;
  model.forward = async inputs => { // WebAssembly does not return to the event loop by itself, and Stop is an event
    if (performance.now() - pause > 50) {
      await new Promise(resolve => setTimeout(resolve));
      pause = performance.now();
    }
    return forward(inputs);
  };
  mark = text => tokenizer.encode(`<|${text}|>`, { add_special_tokens: false })[0];
  postMessage({ ready: `${adapter ? "WebGPU" : "WebAssembly"}, ${dtype}`, examples: tokenizer.config?.examples });
}

function encode(messages) { // without the oldest turns, if the conversation is longer than the model's context
  const ids = tokenizer.apply_chat_template(
    messages, { add_generation_prompt: true, return_tensor: false, return_dict: false });
  const length = model.config.max_position_embeddings;
  if (ids.length < length - Math.min(64, length / 4)) return ids;
  if (messages.length < 2) throw new Error(`too long: ${ids.length} tokens, this model reads ${length}`);
  return encode(messages.slice(2));
}

const tensor = ids => new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);

function result(call) {
  try { return calculate(call) } catch ({ message }) {
    return message.includes("'") ? `{'error': "${message}"}` : `{'error': '${message}'}`; // as Python prints it
  }
}

async function answer(messages, temperature) {
  let ids = encode(messages), tokens = 0;
  const start = ids.length, begin = performance.now(), end = start + 512, reply = [];
  const speed = () => tokens / (performance.now() - begin) * 1e3;
  const show = () => postMessage({ reply: tokenizer.decode(reply), speed: speed() });
  const streamer = { put: ([row]) => row.length === 1 && (reply.push(row[0]), tokens++, show()), end() {} };
  stop.reset();
  while (ids.length < end && !stop.interrupted) {
    const reused = cache.past && cache.ids.every((id, i) => id === ids[i]) && cache.ids.length < ids.length;
    if (!reused) { await cache.past?.dispose(); cache = { ids: [] } }
    const { sequences, past_key_values } = await model.generate({
      inputs: tensor(ids), attention_mask: tensor(ids.map(() => 1)), past_key_values: cache.past ?? null,
      max_new_tokens: end - ids.length, eos_token_id: ["assistant_end", "python_end"].map(mark), streamer,
      do_sample: temperature > 0, temperature, top_k: 50, stopping_criteria: stop, return_dict_in_generate: true,
    });
    ids = sequences.tolist()[0].map(Number);
    cache = { ids: ids.slice(0, -1), past: past_key_values }; // the last token was not read yet
    if (ids.at(-1) !== mark("python_end")) break;
    const from = ids.lastIndexOf(mark("python_start"));
    if (from < start || from < ids.lastIndexOf(mark("python_end"), -2)) continue; // the end of no call
    const text = tokenizer.encode(result(tokenizer.decode(ids.slice(from + 1, -1))), { add_special_tokens: false });
    const output = [mark("output_start"), ...text, mark("output_end")];
    ids.push(...output); reply.push(...output); show();
  }
  postMessage({ done: true });
}

self.onmessage = ({ data }) => {
  if (data.stop) return stop.interrupt();
  const what = data.load ? `no folder of nanochat export --to onnx can be read in ${data.load}: ` : "";
  (data.load ? load(data.load, data.device) : answer(data.messages, data.temperature))
    .catch(error => postMessage({ error: what + (error.message ?? error) }));
};

// Answers a JSON file {model, prompts, length, forced, strings} with what llama.cpp computes in float32, by node-llama-cpp.
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [input, output] = process.argv.slice(2);
const {model: modelPath, prompts, length, forced, strings} = JSON.parse(readFileSync(input, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const sequence = (await model.createContext({contextSize: 512, ...cache})).getSequence();
const answers = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const answer = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
        if (answer.push(token) === length) break;
    answers.push(answer);
}
await sequence.clearHistory();
const sampling = {temperature: 1, topK: 0, topP: 1, minP: 0};
const ask = forced.map((token) => [token, {generateNext: {probabilities: true, options: sampling}}]);
const probabilities = (await sequence.controlledEvaluate(ask)).map(({next}) => [...next.probabilities]);
const ends = answers.flat().concat(forced).filter((token) => model.isEogToken(token));
writeFileSync(output, JSON.stringify({answers, probabilities, ends, ids: strings.map((text) => model.tokenize(text))}));
process.exit();

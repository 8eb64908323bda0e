// The server's address and the inputs that the client scripts share.
import fs from "node:fs";
import { fileURLToPath } from "node:url";

export const BASE_URL = `${process.argv[2]}/v1`;
export const MODEL = "assistant";
const sample = (name) => fileURLToPath(new URL(`../../../assets/samples/${name}`, import.meta.url));
export const QUESTION = "what is two plus three?";
export const ANSWER = "five";
export const CLIP = sample("mary_had_lamb.flac");
export const TRANSCRIPT = "mary had a little lamb its fleece was white as snow";
export const PICTURE = sample("shapes.png");
export const DESCRIPTION = "a big red circle and a little blue square and a big yellow star";
export const encode = (path) => fs.readFileSync(path).toString("base64");
